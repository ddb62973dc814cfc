"""The record of `bench cpu` and `bench gpu`, where a number comes from, and which rows of many runs count.

`date` is the start of the run and the same in all its rows: ratios are only taken between rows of one date.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from alora_kernels.text import counted

OK, WRONG, OUT_OF_MEMORY = "ok", "wrong", "out of memory"
NOT_AVAILABLE, FAILED = "not available: ", "failed: "
FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
EAGER, GRAPH = "eager", "cuda graph"
MODES = (EAGER, GRAPH)
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """One provider, one case, one pass, one mode: see the constants above, and `origin` for the columns of the run."""

    command: str = ""  # "cpu" or "gpu"
    commit: str = ""
    date: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    case: str = ""  # what was asked, e.g. "decode 768"; targets name it
    routing: str = ""
    direction: str = field(default="", metadata={"column": "pass"})
    mode: str = EAGER
    provider: str = ""
    computes: str = ""  # the function of `bench.layers.problem` that this provider computes
    m: int = 0
    k: int = 0
    n: int = 0
    r: int = 0
    e: int = 0
    dtype: str = ""
    p20_ms: float | None = None  # percentiles of the runs; empty where nothing was timed
    p50_ms: float | None = None
    p80_ms: float | None = None
    peak_mb: float | None = None  # above what was allocated before the call; on CPUs of a whole process, or empty
    worst_error: float | None = None  # of the tensor that is nearest to (or furthest beyond) what is allowed
    allowed_error: float | None = None
    status: str = OK
    note: str = ""  # what a reader must know, e.g. that the weights are random

    @property
    def timed(self) -> bool:
        """Whether there are times, which means that the result was right."""
        return self.status == OK and self.p50_ms is not None

    @property
    def whole_model(self) -> bool:
        """Whether it is of a language model, and m counts its tokens."""
        return self.case.startswith("model ")

    @property
    def quantity(self) -> str:
        """The column that the case is about."""
        return "peak_mb" if self.case.startswith("memory ") else "p50_ms"

    @property
    def figure(self) -> float | None:
        """The number in that column."""
        return self.peak_mb if self.quantity == "peak_mb" else self.p50_ms

    @property
    def tokens_per_second(self) -> float | None:
        return 1e3 * self.m / self.p50_ms if self.whole_model and self.p50_ms else None

    @property
    def group(self) -> tuple[str, str, str]:
        """What is compared with one another: case, pass and mode."""
        return self.case, self.direction, self.mode

    @property
    def sizes(self) -> str:
        return " ".join(f"{letter.upper()}={getattr(self, letter)}" for letter in "mknre") + f" {self.dtype}"


RowT = TypeVar("RowT", bound=Any)  # any record with the `date` of its run


def grouped(rows: Iterable[RowT], key: Callable[[RowT], Hashable]) -> list[list[RowT]]:
    """Rows with equal keys together, in the order they came."""
    groups: dict[Hashable, list[RowT]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def newest(
    rows: Iterable[RowT], key: Callable[[RowT], Hashable], counts: Callable[[RowT], bool] = lambda row: True
) -> list[RowT]:
    """For every key the rows of its newest run, of those with a row that counts."""
    chosen: list[RowT] = []
    for same in grouped(rows, key):
        last = max((row.date for row in same if counts(row)), default=None)
        chosen += [row for row in same if row.date == last]
    return chosen


def origin(device: str, *packages: str) -> dict[str, Any]:
    """Columns that are the same for a whole run: when, on what, and with which code and versions it was measured."""
    cpu = f"{_cpu_name()}, {counted(torch.get_num_threads(), 'thread')}"
    return {
        "commit": commit(),
        "date": datetime.now().isoformat(sep=" ", timespec="seconds"),
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **{package: _version(package) for package in packages},
    }


def commit() -> str:
    """Short hash of the checkout, "+dirty" where the code differs from it; "unknown" outside of git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "alora_kernels", "bench", ":!bench/results")
        return head + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    """The processor's name as the kernel knows it, else its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
