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


@pytest.fixture(autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that go to the disk do not go to the state folder of whoever runs the tests."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
