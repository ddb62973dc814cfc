"""Rows of measurements, as CSV and as means.

In:   `Row`s: one number of one module.
Out:  CSV files; means over modules, units and layers, with their spread.
Who:  `study` makes rows, figures and reports read means.

A number that does not exist (the direction of a zero matrix) is NaN in a row, blank in a file, and in no mean.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import files
from .names import Place


class Row(NamedTuple):
    """One number.

    Attributes:
        module, layer, kind: where; see `names.places`.
        part: "A", "B", "sBA", "W", or what else a unit has.
        unit1: label of the unit.
        unit2: what it is compared with: another unit, "zero", "start" or "W0"; blank if nothing.
        measure: what was measured.
        value: NaN where it does not exist.
        chance: what random matrices reach, where that is not zero.
    """

    module: str
    layer: int | None
    kind: str
    part: str
    unit1: str
    unit2: str
    measure: str
    value: float
    chance: float | None = None


class Mean(NamedTuple):
    """A mean over the `known` numbers, those that exist; `sd` is NaN of fewer than two."""

    mean: float
    sd: float
    low: float
    high: float
    known: int


def mean_of(values: Iterable[float]) -> Mean:
    """Mean, standard deviation, extremes; all NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Mean(math.nan, math.nan, math.nan, math.nan, 0)
    sd = statistics.stdev(known) if len(known) > 1 else math.nan
    return Mean(math.fsum(known) / len(known), sd, min(known), max(known), len(known))


def where(rows: Iterable[Row], part: str, measure: str, unit2: str | None = None) -> list[Row]:
    """The rows of one measure; of one comparison only, if given."""
    return [r for r in rows if r.part == part and r.measure == measure and unit2 in (None, r.unit2)]


def measures(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """(part, measure) of the rows that have a value: parts as they first appear, of each the cosine first."""
    found = list(dict.fromkeys((row.part, row.measure) for row in rows if not math.isnan(row.value)))
    parts = list(dict.fromkeys(part for part, _ in found))
    return sorted(found, key=lambda key: (parts.index(key[0]), key[1] != "cosine"))


def square(rows: Iterable[Row], labels: Sequence[str]) -> NDArray[np.float64]:
    """Means of pairs `[n, n]`, symmetric; NaN on the diagonal and where nothing was compared."""
    place = {label: i for i, label in enumerate(labels)}
    total, count = np.zeros((len(labels),) * 2), np.zeros((len(labels),) * 2)
    for row in rows:
        if not math.isnan(row.value):
            i, j = sorted((place[row.unit1], place[row.unit2]))
            total[i, j] += row.value
            count[i, j] += 1
    with np.errstate(invalid="ignore"):
        upper: NDArray[np.float64] = total / count
    upper[np.tril_indices(len(labels))] = np.nan
    return np.where(np.isnan(upper), upper.T, upper)


def over_layers(rows: Iterable[Row]) -> dict[str, dict[int, Mean]]:
    """kind -> layer -> mean over units or pairs; modules without a layer are left out."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.layer is not None and not math.isnan(row.value):
            found.setdefault(row.kind, {}).setdefault(row.layer, []).append(row.value)
    return {k: {n: mean_of(v) for n, v in sorted(layers.items())} for k, layers in sorted(found.items())}


def by_unit(rows: Iterable[Row]) -> dict[str, Mean]:
    """unit1 -> mean over modules."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.unit1, []).append(row.value)
    return {unit: mean_of(values) for unit, values in found.items()}


def by_pair(rows: Iterable[Row]) -> dict[tuple[str, ...], Mean]:
    """(unit1, unit2) -> mean over modules."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        found.setdefault((row.unit1, row.unit2), []).append(row.value)
    return {pair: mean_of(values) for pair, values in found.items()}


def rows_at(place: Place, module: str) -> Any:
    """A maker of rows of one module: (part, unit1, unit2, measure, value, chance) -> `Row`."""

    def make(part: str, unit1: str, unit2: str, measure: str, value: float, chance: float | None = None) -> Row:
        return Row(module, place.layer, place.kind, part, unit1, unit2, measure, float(value), chance)

    return make


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
    return "" if value is None else value
