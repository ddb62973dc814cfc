"""GPU runs that watch every access: NVIDIA's compute-sanitizer, and Triton's sanitizer for races between programs.

The second one (`triton.tools.gsan`, Triton 3.9 and later, NVIDIA only) has the release and the acquire of each flag in
its model. It compiles kernels anew with its checks, needs a C compiler, and takes no CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SCRIPT = "tests/kernels/sanitized.py"


def run(*command: str) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    code, said = run(sanitizer, "--tool", tool, "--error-exitcode", "7", sys.executable, SCRIPT)
    if "not supported" in said:
        pytest.skip(f"compute-sanitizer cannot watch this machine: {said[-300:]}")
    assert code == 0, said[-3000:]


def why_no_gsan() -> str | None:
    """The reason why Triton's sanitizer cannot run here."""
    if torch.version.hip is not None:
        return "triton.tools.gsan watches NVIDIA chips only"
    if importlib.util.find_spec("triton.tools.gsan") is None:
        return "this Triton has no triton.tools.gsan: 3.9 and later have it"
    return None


@pytest.fixture
def gsan() -> tuple[str, ...]:
    if reason := why_no_gsan():
        pytest.skip(reason)
    return (sys.executable, "-m", "triton.tools.gsan", SCRIPT)


@pytest.mark.timeout(900)
def test_every_access_is_ordered(gsan: tuple[str, ...]) -> None:
    code, said = run(*gsan)
    assert code == 0, said[-3000:]


@pytest.mark.timeout(900)
def test_a_flag_without_a_release_is_found(gsan: tuple[str, ...]) -> None:
    """Or the test above would prove nothing."""
    code, said = run(*gsan, "racing")
    assert code != 0 and "race detected" in said, said[-3000:]
