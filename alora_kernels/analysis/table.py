"""What an analysis found: `Row`s of `comparison`, one number of one module each, as CSV files and as means.

A number that does not exist (the direction of a zero matrix) is NaN in a row, blank in a file, and in no mean. Also
what things are called in rows, tables, figures and reports alike: measures, modules by layer and kind, units.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import files
from .gradients import ConflictFile

_MEASURES = {
    "cosine": "cosine of {}",
    "overlap": "subspace overlap of {}",
    "magnitude": "change of length, {}",
    "direction": "change of direction, {}",
    "frobenius": "norm of {}",
}
SKIPPED = ("unit1", "unit2", "part", "measure", "reason", "modules", "first")


class Place(NamedTuple):
    """Where a module is: the first number in its name (None without one), and which of the layer's modules it is."""

    layer: int | None
    kind: str


class Row(NamedTuple):
    """One number of one module, whose layer and kind `places` says."""

    module: str
    layer: int | None
    kind: str
    part: str  # "A", "B", "sBA", "W", or what else a unit has
    unit1: str  # label of the unit
    unit2: str  # what it is compared with: another unit, "zero", "start" or "W0"; blank if nothing
    measure: str
    value: float  # NaN where it does not exist
    chance: float | None = None  # what random matrices reach, where that is not zero


COLUMNS = Row._fields


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
    """What was found."""

    units: list[Described]  # what was compared
    places: dict[str, Place]  # module -> layer and kind, in the model's order
    similarity: list[Row] = field(default_factory=list, repr=False)  # of pairs; "cosine" and "overlap" of each part
    changes: list[Row] = field(default_factory=list, repr=False)  # of each unit against "zero", "start" or "W0"
    norms: list[Row] = field(default_factory=list, repr=False)  # sizes and ranks; "sBA" is the change of the weight
    skipped: list[Skipped] = field(default_factory=list, repr=False)  # what was not compared
    notes: list[str] = field(default_factory=list)  # what a reader must know, in sentences
    conflicts: list[ConflictFile] = field(default_factory=list, repr=False)  # that lay beside the adapters

    @property
    def labels(self) -> list[str]:
        """Of the units, in order."""
        return [unit.label for unit in self.units]

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [*self.similarity, *self.changes, *self.norms]

    def save(self, folder: str | Path) -> list[Path]:
        """Write `similarity.csv`, `changes.csv`, `norms.csv` and `not_compared.csv`, replacing files of these names."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        left = ((*s[:5], len(s.modules), s.modules[0] if s.modules else "") for s in self.skipped)
        return [
            write_csv(out / "similarity.csv", COLUMNS, self.similarity),
            write_csv(out / "changes.csv", COLUMNS, self.changes),
            write_csv(out / "norms.csv", COLUMNS, self.norms),
            write_csv(out / "not_compared.csv", SKIPPED, left),
        ]


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a file whole or not at all; numbers with nine digits, NaN and None blank."""
    with files.replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(header)
        out.writerows([_cell(value) for value in row] for row in rows)
    return path


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return value


class Mean(NamedTuple):
    """A mean over the `known` numbers, those that exist; `sd` is NaN of fewer than two."""

    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan
    known: int = 0


def mean_of(values: Iterable[float | None]) -> Mean:
    """All NaN where no value is known."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return Mean()
    sd = statistics.stdev(known) if len(known) > 1 else math.nan
    return Mean(math.fsum(known) / len(known), sd, min(known), max(known), len(known))


def where(rows: Iterable[Row], part: str, measure: str, unit2: str | None = None) -> list[Row]:
    """The rows of one measure; of one comparison only, if given."""
    return [r for r in rows if r.part == part and r.measure == measure and unit2 in (None, r.unit2)]


def origins(rows: Iterable[Row], part: str, measure: str) -> list[str]:
    """What one measure of a change was measured from."""
    return list(dict.fromkeys(row.unit2 for row in where(rows, part, measure)))


def measures(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(part, measure) of the rows that have a value: parts as they first appear, of each the cosine first."""
    found = list(dict.fromkeys((row.part, row.measure) for row in rows if not math.isnan(row.value)))
    parts = list(dict.fromkeys(part for part, _ in found))
    return sorted(found, key=lambda key: (parts.index(key[0]), key[1] != "cosine"))


def means(rows: Iterable[Row], *by: str, of: str = "value") -> dict[tuple[Any, ...], Mean]:
    """The mean of a field over each group of rows that are alike in the others."""
    found: dict[tuple[Any, ...], list[float | None]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in by), []).append(getattr(row, of))
    return {group: mean_of(values) for group, values in found.items()}


def over_layers(rows: Iterable[Row], by: str = "kind") -> dict[str, dict[int, Mean]]:
    """kind (or another field) -> layer -> mean, both in order; modules without a layer are left out."""
    known = (row for row in rows if row.layer is not None and not math.isnan(row.value))
    found: dict[str, dict[int, Mean]] = {}
    for (name, layer), mean in sorted(means(known, by, "layer").items()):
        found.setdefault(name, {})[layer] = mean
    return found


def square(rows: Iterable[Row], labels: Sequence[str]) -> NDArray[np.float64]:
    """Means of pairs `[n, n]`, symmetric; NaN on the diagonal and where nothing was compared."""
    table = np.full((len(labels),) * 2, np.nan)
    for pair, mean in means(rows, "unit1", "unit2").items():
        i, j = map(labels.index, pair)
        table[i, j] = table[j, i] = mean.mean
    return table


def named(part: str, measure: str) -> str:
    """A measure of a part in words."""
    template = _MEASURES.get(measure, f"{measure.replace('_', ' ')} of {{}}")
    return template.format("s B A" if part == "sBA" else part)


def places(modules: Iterable[str]) -> dict[str, Place]:
    """Layer and kind of each module, in the order of a model: by layer, then by name.

    A kind is the shortest end of the name behind the layer number that no other kind ends in: `q_proj`, but in BERT
    `attention.output.dense` beside `intermediate.dense`.
    """
    split = {module: _split(module) for module in modules}
    tails = {tail for _, tail in split.values()}
    kinds = {tail: _shortest_end(tail, tails - {tail}) for tail in tails}
    found = {module: Place(layer, kinds[tail]) for module, (layer, tail) in split.items()}
    return dict(sorted(found.items(), key=lambda item: (item[1].layer is None, item[1].layer or 0, item[0])))


def _split(module: str) -> tuple[int | None, tuple[str, ...]]:
    """The layer number and what comes after it; further numbers (experts) become `*`, so that they share a kind."""
    words = module.split(".")
    at = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    if at is None or at == len(words) - 1:
        return None, tuple(words)
    return int(words[at]), tuple("*" if word.isdecimal() else word for word in words[at + 1 :])


def _shortest_end(tail: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    ends = (tail[-n:] for n in range(1, len(tail)) if not any(other[-n:] == tail[-n:] for other in others))
    return ".".join(next(ends, tail))


def distinct(paths: Sequence[Sequence[str]]) -> list[str]:
    """A short label for each path, no two alike; a path's words go from special to general: task, folder, parent, ...

    The first word where it is enough; else `word/first` with the nearest word that tells those of one first word apart;
    else as many words as it takes, or a number.
    """
    labels = [path[0] for path in paths]
    for label in {label for label in labels if labels.count(label) > 1}:
        group = [i for i, path in enumerate(paths) if path[0] == label]
        for i, longer in zip(group, _apart([paths[i] for i in group]), strict=True):
            labels[i] = longer
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[i] = label if seen[label] == 1 else f"{label} ({seen[label]})"
    return labels


def _apart(paths: Sequence[Sequence[str]]) -> list[str]:
    deepest = max(map(len, paths))
    near = ([f"{path[n] if n < len(path) else ''}/{path[0]}".lstrip("/") for path in paths] for n in range(1, deepest))
    whole = (["/".join(reversed(path[:n])) for path in paths] for n in range(2, deepest + 1))
    unique = (labels for labels in chain(near, whole) if len(set(labels)) == len(labels))
    return next(unique, [path[0] for path in paths])
