"""The fake engine most tests of the HTTP server stand around."""

from collections.abc import Iterator

import pytest
from enginefakes import FakeEngine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """Started, with the tasks movie and spam."""
    with FakeEngine() as fake:
        yield fake
