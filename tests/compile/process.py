"""Compilation needs a process of its own: this one may run the interpreter, which compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def compiling(*arguments: str, python: str = sys.executable) -> str:
    """What `python <arguments>` prints without the interpreter, compiling as for users."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "ALORA_WAIT_TURNS")}
    env |= {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout
