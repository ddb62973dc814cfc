"""A cache folder of its own, and a chip that never was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="what is tuned is Triton's")

from alora_kernels.kernels import tuned


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that tables are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.find.cache_clear()
    yield tmp_path / "alora-kernels"
    tuned.find.cache_clear()
