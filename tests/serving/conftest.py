"""The fake engine most tests of the HTTP server stand around."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from enginefakes import FakeEngine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """Started, with the tasks movie and spam."""
    from enginefakes import FakeEngine  # a GPU run may lack what a server needs

    with FakeEngine() as fake:
        yield fake
