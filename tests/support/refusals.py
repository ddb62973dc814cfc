"""A call that must end in an error whose text says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refused(message: str, call: Callable[..., Any], *args: Any, error: type[Exception] = ValueError, **options: Any):
    """`message` is a regular expression for the text."""
    with pytest.raises(error, match=message):
        call(*args, **options)
