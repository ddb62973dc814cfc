"""What fits on one screen: a line per pair, a line per unit, reasons that belong together.

In:   an `Analysis`.
Out:  `Column`s of means over modules; pairs in order of what says most; groups of what was not compared.
Who:  `report` and the command line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .labels import NAMES
from .table import Mean, by_pair, by_unit, mean_of, measures, where

if TYPE_CHECKING:
    from .result import Analysis

NOTHING = Mean(math.nan, math.nan, math.nan, math.nan, 0)


class Column(NamedTuple):
    """One measure of all pairs or units; `chance` is the mean level of random matrices, NaN where that is zero."""

    title: str
    values: dict[tuple[str, ...], Mean]
    chance: float = math.nan

    @property
    def heading(self) -> str:
        """The title, with the level of chance."""
        return self.title if math.isnan(self.chance) else f"{self.title} (chance {number(self.chance)})"


class Group(NamedTuple):
    """What was left out for one reason."""

    part: str
    measure: str
    reason: str
    units: list[tuple[str, ...]]
    modules: list[str]


def pair_columns(analysis: Analysis) -> list[Column]:
    """A column per part and measure."""
    columns = []
    for key in measures(analysis.similarity):
        rows = where(analysis.similarity, *key)
        chance = mean_of(row.chance for row in rows if row.chance is not None).mean
        columns.append(Column(NAMES[key], by_pair(rows), chance))
    return columns


def pairs(columns: Sequence[Column], most: int) -> tuple[list[tuple[str, ...]], int]:
    """At most so many pairs, the most and the least alike first and last, and how many were left out.

    Alike by the first subspace overlap, which depends on no basis; by the first column if there is none.
    """
    every = list(dict.fromkeys(pair for column in columns for pair in column.values))
    if not columns:
        return [], 0
    by = next((column for column in columns if not math.isnan(column.chance)), columns[0])

    def value(pair: tuple[str, ...]) -> float:
        mean = by.values.get(pair, NOTHING).mean
        return -math.inf if math.isnan(mean) else mean

    every.sort(key=value, reverse=True)
    if len(every) <= most:
        return every, 0
    return every[: most - most // 2] + every[-(most // 2) :], len(every) - most


def unit_columns(analysis: Analysis) -> list[Column]:
    """Changes against each start, then ranks and norms."""
    columns = []
    for part, measure in measures(analysis.changes):
        wanted = ("relative_magnitude", "direction") if part == "W" else ("magnitude", "direction", "overlap")
        if measure not in wanted:
            continue
        for unit2 in dict.fromkeys(row.unit2 for row in where(analysis.changes, part, measure)):
            rows = where(analysis.changes, part, measure, unit2)
            level = mean_of(row.chance for row in rows if row.chance is not None).mean
            columns.append(Column(f"{NAMES[part, measure]}, from {unit2}", _by_unit(by_unit(rows)), level))
    for key in measures(analysis.norms):
        if key[1] == "effective_rank" or (key[1] == "frobenius" and (key[0] == "sBA" or key[0].startswith("lambda"))):
            columns.append(Column(NAMES[key], _by_unit(by_unit(where(analysis.norms, *key)))))
    return columns


def _by_unit(means: dict[str, Mean]) -> dict[tuple[str, ...], Mean]:
    return {(label,): mean for label, mean in means.items()}


def groups(analysis: Analysis) -> list[Group]:
    """What was not compared, by reason; those that concern most modules first."""
    found: dict[tuple[str, str, str], tuple[dict[tuple[str, ...], None], dict[str, None]]] = {}
    for one, two, part, measure, reason, modules in analysis.skipped:
        units, names = found.setdefault((part, measure, reason), ({}, {}))
        units[(one, two) if two else (one,)] = None
        names.update(dict.fromkeys(modules))
    made = [Group(*key, list(units), list(names)) for key, (units, names) in found.items()]
    return sorted(made, key=lambda group: -len(group.units) * max(1, len(group.modules)))


def shown(mean: Mean) -> str:
    """`0.123 ± 0.045`; a dash for nothing."""
    if not mean.known:
        return "–"
    return number(mean.mean) if math.isnan(mean.sd) else f"{number(mean.mean)} ± {number(mean.sd)}"


def number(value: float) -> str:
    """Three decimals; more where these would say nothing, unless it is rounding."""
    if abs(value) < 1e-9:
        return "0.000"
    if value and abs(value) < 0.0995:
        return f"{value:.2g}" if abs(value) < 0.001 else f"{value:.4f}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def counted(count: int, what: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def which(units: Sequence[tuple[str, ...]], most: int = 2) -> str:
    """Pairs or units by name, the first few of many."""
    names = [" with ".join(unit) for unit in units[:most]]
    return ", ".join(names) + (f" and {len(units) - most} more" if len(units) > most else "")
