"""What an analysis found: rows of similarity, change and size, what could not be compared and why.

In:   rows from `study`.
Out:  `Analysis`; CSV files.
Who:  `study` fills it; `summary`, `heatmaps`, `curves` and `report` read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .conflict_files import ConflictFile
from .names import Place
from .table import Row, write_csv

COLUMNS = ("module", "layer", "kind", "part", "unit1", "unit2", "measure", "value", "chance")
SKIPPED = ("unit1", "unit2", "part", "measure", "reason", "modules", "first")


class Skipped(NamedTuple):
    """What was not compared: two units (or one), a part, a measure, the reason, and in which modules."""

    unit1: str
    unit2: str
    part: str
    measure: str
    reason: str
    modules: tuple[str, ...]


class Described(NamedTuple):
    """A unit as tables show it."""

    label: str
    kind: str
    modules: int
    rank: int | None
    base: str | None
    folder: Path


@dataclass(eq=False)
class Analysis:
    """What was found.

    Attributes:
        units: what was compared.
        places: module -> layer and kind, in the model's order.
        similarity: of pairs; measures "cosine" and "overlap" of each part.
        changes: of each unit against "zero", "start" or "W0".
        norms: sizes and ranks of each unit; part "sBA" is its change of the weight.
        skipped: what was not compared.
        notes: what a reader must know, in sentences.
        conflicts: gradient conflicts that lay beside the adapters.
    """

    units: list[Described]
    places: dict[str, Place]
    similarity: list[Row] = field(default_factory=list, repr=False)
    changes: list[Row] = field(default_factory=list, repr=False)
    norms: list[Row] = field(default_factory=list, repr=False)
    skipped: list[Skipped] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)
    conflicts: list[ConflictFile] = field(default_factory=list, repr=False)

    @property
    def labels(self) -> list[str]:
        """Of the units, in order."""
        return [unit.label for unit in self.units]

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [*self.similarity, *self.changes, *self.norms]

    def save(self, folder: str | Path) -> list[Path]:
        """Write `similarity.csv`, `changes.csv`, `norms.csv` and `not_compared.csv`.

        Args:
            folder: made if needed; files of these names are replaced.

        Returns:
            The files.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        tables = {"similarity": self.similarity, "changes": self.changes, "norms": self.norms}
        files = [write_csv(out / f"{name}.csv", COLUMNS, rows) for name, rows in tables.items()]
        left = ((*s[:5], len(s.modules), s.modules[0] if s.modules else "") for s in self.skipped)
        return [*files, write_csv(out / "not_compared.csv", SKIPPED, left)]
