"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from alora_kernels import data
from alora_kernels.recipes import display
from tests.support.toyrows import write


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables in full, whatever terminal the tests run in."""
    monkeypatch.setattr(display.console, "_width", 160)


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads data or a model fails."""
    for name in ("load_model", "load_tasks"):
        monkeypatch.setattr(data, name, lambda *_, **__: pytest.fail("loaded before everything was checked"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Two tasks of a user's own in one file, which give the same numbers opposite answers."""
    answers = {"even": ("yes", "no"), "odd": ("no", "yes")}
    return write(
        tmp_path / "parity.jsonl",
        (
            {"prompt": f"Number {i}: is it {task}?", "answer": answers[task][i % 2], "task": task}
            for i in range(40)
            for task in answers
        ),
    )
