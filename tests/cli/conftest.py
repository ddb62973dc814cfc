"""What the tests of the command line share."""

from __future__ import annotations

import pytest

from alora_kernels.recipes import display


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables in full, whatever terminal the tests run in."""
    monkeypatch.setattr(display.console, "_width", 160)
