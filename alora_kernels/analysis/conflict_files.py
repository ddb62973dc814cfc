"""The CSV files of `ConflictCallback` that lie beside an adapter, summed up for figures and reports.

In:   a folder.
Out:  `ConflictFile`s: rows by step, module and parameter.
Who:  `study`.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .gradients import COLUMNS

MAX_ROWS = 1_000_000  # 210 modules, A and B, 2000 measurements


class Measured(NamedTuple):
    """One row: a matrix at a step. `conflicts` of `pairs` pairs of tasks had gradients of negative cosine."""

    step: int
    module: str
    parameter: str
    sharing: str
    norm: float
    conflicts: int
    pairs: int


class ConflictFile(NamedTuple):
    """One file; `why` says why it could not be read."""

    path: Path
    rows: list[Measured]
    why: str = ""

    def share(self, rows: list[Measured]) -> float:
        """Conflicting pairs over pairs, of some of the rows; NaN without pairs."""
        pairs = sum(row.pairs for row in rows)
        return sum(row.conflicts for row in rows) / pairs if pairs else float("nan")

    def by_step(self, rows: list[Measured] | None = None) -> Iterator[tuple[int, list[Measured]]]:
        """The rows of each step."""
        ordered = sorted(self.rows if rows is None else rows, key=lambda row: row.step)
        for step, same in itertools.groupby(ordered, key=lambda row: row.step):
            yield step, list(same)


def conflict_files(folder: Path) -> list[ConflictFile]:
    """The files in a folder with the callback's header; of a folder called `adapter` those beside it as well."""
    folders = [folder, folder.parent] if folder.name == "adapter" else [folder]
    return [read for place in folders for path in sorted(place.glob("*.csv")) if (read := _read(path)) is not None]


def _read(path: Path) -> ConflictFile | None:
    """None of a file that is something else."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                return None
    except (OSError, ValueError, csv.Error):
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_measured(row) for row in itertools.islice(csv.reader(file), 1, MAX_ROWS)]
    except (OSError, ValueError, csv.Error) as error:
        return ConflictFile(path, [], f"{path} does not read as gradient conflicts ({error})")
    return ConflictFile(path, rows, "" if rows else f"{path} has no row: nothing was measured yet")


def _measured(row: list[str]) -> Measured:
    step, module, parameter, sharing, norm, conflicts, pairs = row
    return Measured(int(step), module, parameter, sharing, float(norm), int(conflicts), int(pairs))
