"""What tests do with processes: wait for the end of one or for a line of its log, kill it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from alora_kernels.federated.deploy.processes import Process

ROOT = Path(__file__).parent.parent.parent


def gloo(count: int, *command: str, seconds: float = 240.0) -> str:
    """What so many processes of torchrun printed; a CalledProcessError with it if one failed."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, env=variables, cwd=ROOT, timeout=seconds
    )
    text = done.stdout + done.stderr
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, text)
    return text


def until(happened: Callable[[], bool], seconds: float, what: str) -> None:
    """Until it has happened."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def wait(process: Process, seconds: float) -> int:
    """Its exit code."""
    for code in process.looks(seconds):
        if code is not None:
            return code
    pytest.fail(f"{process.name} still runs after {seconds} s:\n{process.log.read_text()}")


def wait_line(process: Process, text: str, seconds: float = 60.0) -> None:
    """Until its log holds `text`; a FlowerError if it ends without."""
    for _ in process.looks(seconds):
        with process.open_log() as log:
            if text in log.read():
                return
    pytest.fail(f"{process.name} did not log {text!r} in {seconds} s:\n{process.log.read_text()}")


def kill(process: Process) -> None:
    """SIGKILL to it and all its descendants, as a machine that loses power; nothing if it has ended."""
    if process.exit_code is None:
        root = psutil.Process(process.pid)
        for victim in [*root.children(recursive=True), root]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        wait(process, 60)
