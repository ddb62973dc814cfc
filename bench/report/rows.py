"""The record of `bench cpu` and `bench gpu`, and which rows of many runs count.

In:   a measured (or failed) provider.
Out:  `Row`, a line of a `bench.report.sheet.Sheet`.
Who:  `bench.run` makes them; `bench.report.targets`, `bench.report.tables`, `bench.report.plot` read.

`date` is the start of the run and the same in all its rows: ratios are only taken between rows of one date.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OK, WRONG, OUT_OF_MEMORY = "ok", "wrong", "out of memory"
NOT_AVAILABLE, FAILED = "not available: ", "failed: "
EAGER, GRAPH = "eager", "cuda graph"
MODES = (EAGER, GRAPH)
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Row:
    """One provider, one case, one pass, one mode.

    Attributes:
        command: the command that measured, "cpu" or "gpu".
        commit: short hash, "+dirty" where the code differs from it.
        date: start of the run, ISO.
        device: processor and threads, or the GPU.
        case: what was asked, e.g. "decode 768"; targets name it.
        routing: "task" or "soft".
        direction: "forward" or "forward+backward"; the column is called `pass`.
        mode: "eager" or "cuda graph".
        computes: the function of `bench.layers.functions` that this provider computes.
        p20_ms, p50_ms, p80_ms: percentiles of the runs; empty where nothing was timed.
        peak_mb: MB above what was allocated before the call; GPUs only.
        worst_error, allowed_error: of the tensor that is nearest to (or furthest beyond) what is allowed.
        status: "ok", "wrong", "out of memory", "not available: ...", "failed: ...".
        note: what a reader must know, e.g. that the weights are random.
    """

    command: str = ""
    commit: str = ""
    date: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    case: str = ""
    routing: str = ""
    direction: str = field(default="", metadata={"column": "pass"})
    mode: str = EAGER
    provider: str = ""
    computes: str = ""
    m: int = 0
    k: int = 0
    n: int = 0
    r: int = 0
    e: int = 0
    dtype: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    peak_mb: float | None = None
    worst_error: float | None = None
    allowed_error: float | None = None
    status: str = OK
    note: str = ""

    @property
    def timed(self) -> bool:
        """Whether there are times, which means that the result was right."""
        return self.status == OK and self.p50_ms is not None

    @property
    def whole_model(self) -> bool:
        """Whether it is of a language model, and m counts its tokens."""
        return self.case.startswith("model ")

    @property
    def tokens_per_second(self) -> float | None:
        """Of a language model."""
        return 1e3 * self.m / self.p50_ms if self.whole_model and self.p50_ms else None

    @property
    def group(self) -> tuple[str, str, str]:
        """What is compared with one another: case, pass and mode."""
        return self.case, self.direction, self.mode


def newest(rows: Iterable[Row]) -> list[Row]:
    """For every case, pass and mode the rows of its newest run that timed anything."""
    by_run: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        by_run.setdefault(row.group, {}).setdefault(row.date, []).append(row)
    chosen: list[Row] = []
    for runs in by_run.values():
        useful = [date for date, same in runs.items() if any(row.timed for row in same)]
        if useful:
            chosen += runs[max(useful)]
    return chosen


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by what is compared with one another, in the order they came."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups
