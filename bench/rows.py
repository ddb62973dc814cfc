"""The one record of this suite, and the CSV file it goes to and comes from.

In:   a measured (or failed) provider.
Out:  `Row`, appended to a CSV and flushed at once, so that an interrupted run keeps what it measured; read again by
      `bench.plot`.
Who:  `bench.run` writes, `bench.targets`, `bench.tables`, `bench.plot` read.

`date` is the start of the run and the same in all its rows: ratios are only taken between rows of one date.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

OK, WRONG, OUT_OF_MEMORY = "ok", "wrong", "out of memory"
NOT_AVAILABLE, FAILED = "not available: ", "failed: "
EAGER, GRAPH = "eager", "cuda graph"
MODES = (EAGER, GRAPH)
RESULTS = Path(__file__).parent / "results"


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
        computes: the function of `bench.functions` that this provider computes.
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
    direction: str = ""
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
    def group(self) -> tuple[str, str, str]:
        """What is compared with one another: case, pass and mode."""
        return self.case, self.direction, self.mode


_COLUMNS = {"direction": "pass"}
HEADER = [_COLUMNS.get(field.name, field.name) for field in fields(Row)]
_CASTS: dict[str, Callable[[str], Any]] = {"int": int, "float | None": lambda text: float(text) if text else None}


class Sheet:
    """A CSV file that grows row by row.

    Raises:
        ValueError: the file exists and has other columns; the message says what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists() or path.stat().st_size == 0
        if not is_new:
            with path.open(newline="") as file:
                if next(csv.reader(file), []) != HEADER:
                    raise ValueError(f"{path} has other columns than this version writes: move it or choose --out")
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)
        if is_new:
            self._writer.writerow(HEADER)

    def add(self, row: Row) -> None:
        """Append a row, on disk when this returns."""
        self._writer.writerow([_as_text(value) for value in asdict(row).values()])
        self._file.flush()
        self.count += 1

    def __enter__(self) -> Sheet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._file.close()


def read(path: Path) -> list[Row]:
    """All rows of a CSV file, oldest first.

    Raises:
        ValueError: it has other columns than `Row`.
    """
    with path.open(newline="") as file:
        reader = csv.reader(file)
        if next(reader, []) != HEADER:
            raise ValueError(f"{path} is not a result of this version of the benchmarks: its columns differ")
        return [
            Row(**{f.name: _CASTS.get(str(f.type), str)(text) for f, text in zip(fields(Row), line, strict=True)})
            for line in reader
        ]


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


def _as_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    return "" if value is None else str(value)
