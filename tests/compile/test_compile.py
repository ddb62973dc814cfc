"""Every kernel variant compiles for every chip, spills nothing and fits in shared memory; no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAUNCHED = {
    "_dropout_mask_kernel",
    "_dx_soft_kernel",
    "_dx_task_kernel",
    "_expand_backward_kernel",
    "_expand_kernel",
    "_gate_backward_kernel",
    "_soft_shrink_kernel",
    "_task_shrink_kernel",
    "_wgrad_kernel",
}
# about 550 variants, half a second each
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The report of `bench static`, from a process of its own: this one may run the interpreter."""
    file = tmp_path_factory.mktemp("static") / "static.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "bench", "static", "--json", str(file)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_is_covered(rows: list[dict[str, Any]], chip: str) -> None:
    assert {row["kernel"] for row in rows if row["chip"] == chip} == LAUNCHED


@pytest.mark.parametrize("chip", CHIPS)
def test_nothing_spills(rows: list[dict[str, Any]], chip: str) -> None:
    assert [row for row in rows if row["chip"] == chip and row["spilled"]] == []


@pytest.mark.parametrize("chip", CHIPS)
def test_shared_memory_fits(rows: list[dict[str, Any]], chip: str) -> None:
    assert [row for row in rows if row["chip"] == chip and row["shared"] > row["shared_limit"]] == []
