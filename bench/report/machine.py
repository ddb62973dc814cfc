"""Which machine and which code a number belongs to.

In:   nothing but the process: git, torch, the processor or GPU.
Out:  the columns of a `Row` that are the same for a whole run.
Who:  the commands, once per run.
"""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .rows import Row

ROOT = Path(__file__).parents[2]


def this_run(command: str, device: str) -> Row:
    """An otherwise empty row that says who measures, when, on what.

    Args:
        command: "cpu" or "gpu".
        device: torch's name of the device, "cpu" or "cuda".
    """
    threads = torch.get_num_threads()
    cpu = f"{cpu_name()}, {threads} thread{'' if threads == 1 else 's'}"
    return Row(
        command=command,
        commit=commit(),
        date=datetime.now().isoformat(sep=" ", timespec="seconds"),
        device=cpu if device == "cpu" else torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=_version("triton"),
    )


def origin(command: str, device: str) -> dict[str, Any]:
    """Columns of a row that name transformers and PEFT too: when, on what and with which versions it was measured.

    Args:
        command, device: as `this_run`.
    """
    run = this_run(command, device)
    versions = {name: metadata.version(name) for name in ("transformers", "peft")}
    return {"commit": run.commit, "date": run.date, "device": run.device, "torch": run.torch, **versions}


def commit() -> str:
    """Short hash of the checkout, "+dirty" where the code differs from it; "unknown" outside of git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "alora_kernels", "bench", ":!bench/results")
        return head + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """The processor's name as the kernel knows it, else its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
