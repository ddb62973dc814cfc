"""One page that shows an `Analysis`: what was compared, how to read it, tables, figures, what is missing and why.

`alora analyze` prints the same columns. Names of tasks, folders and modules come from strangers: the template escapes
every text, and the page's own policy would run nothing even if it did not.
"""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from .. import files
from ..text import counted, listed
from ..version import __version__
from .figures import Picture, pictures
from .gradients import ConflictFile, share_of
from .table import Analysis, Mean, Row, mean_of, means, measures, named, origins, where

PAIRS, REASONS, UNITS = 24, 40, 64  # lines of a table; the files have all
PACKAGES = ("torch", "peft", "safetensors", "numpy", "matplotlib")
_OURS = re.compile(r"(similarity(-layers)?|(changes|update)-layers|norms-units|layers-\w+-\w+|conflicts(-\d+)?)\.png")


def write_report(analysis: Analysis, folder: str | Path, *, command: str | None = None, figures: bool = True) -> Path:
    """Write figures (PNG) and `report.html`, one file without anything from elsewhere, into a folder; gives the page.

    Figures of an earlier run that this one does not have are removed. `command` is what made it, for the reader who
    wants to make it again. An ImportError if figures are wanted and matplotlib is missing.
    """
    drawn = list(pictures(analysis)) if figures else []
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    images = out / "figures"
    for old in [p for p in images.glob("*.png") if _OURS.fullmatch(p.name)]:
        old.unlink()
    for picture in drawn:
        images.mkdir(exist_ok=True)
        (images / f"{picture.name}.png").write_bytes(picture.light)
    path = out / "report.html"
    with files.replacing(path) as draft:
        draft.write_text(render(analysis, drawn, command), encoding="utf-8")
    return path


def render(analysis: Analysis, drawn: Sequence[Picture] = (), command: str | None = None) -> str:
    """The page as text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        autoescape=True, keep_trailing_newline=True, loader=loader, undefined=jinja2.StrictUndefined
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    per_pair, per_unit, reasons = pair_columns(analysis), unit_columns(analysis), groups(analysis)
    chosen, more = pairs(per_pair, PAIRS)
    between = f"; the most and the least alike, {more} pairs between them are in similarity.csv" if more else ""
    return environment.get_template("report.html").render(
        title=f"Inside {which([(label,) for label in analysis.labels], 6)}",
        lead=_lead(analysis),
        analysis=analysis,
        compared=[
            (unit.label, unit.kind, unit.rank or "–", unit.modules, unit.base or "not said", unit.folder)
            for unit in analysis.units[:UNITS]
        ],
        between=between,
        pairs_head=("pair", *(column.heading for column in per_pair)),
        pairs=[(" – ".join(pair), *(shown(column.of(pair)) for column in per_pair)) for pair in chosen],
        units_head=("unit", *(column.heading for column in per_unit)),
        units=[(name, *(shown(column.of((name,))) for column in per_unit)) for name in analysis.labels[:UNITS]],
        drawn=drawn,
        conflicts=[_conflict_line(file) for file in analysis.conflicts],
        reasons=counted(len(reasons), "reason"),
        missing=[_missing(group) for group in reasons[:REASONS]],
        command=command,
        made_with=_made_with(),
    )


def _lead(analysis: Analysis) -> str:
    layers = {place.layer for place in analysis.places.values() if place.layer is not None}
    text = f"{counted(len(analysis.units), 'unit')}, {counted(len(analysis.places), 'module')}"
    return f"{text} in {counted(len(layers), 'layer')}." if layers else f"{text}."


def _conflict_line(file: ConflictFile) -> str:
    if file.why:
        return file.why
    step = max(row.step for row in file.rows)
    shared = [row for row in file.rows if row.step == step and row.pairs]
    share = f"{100 * share_of(shared):.0f} % of its pairs of tasks" if shared else "no pairs: nothing is shared"
    return f"{file.path}: {counted(len(file.rows), 'row')}; at step {step} in conflict: {share}"


def _made_with() -> str:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = [f"alora-kernels {__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{', '.join(versions)}; {now}. Numbers in float64."


class Column(NamedTuple):
    """One measure of all pairs or units; `chance` is the mean level of random matrices, NaN where that is zero."""

    title: str
    values: dict[tuple[str, ...], Mean]
    chance: float = math.nan

    @property
    def heading(self) -> str:
        """The title, with the level of chance."""
        return self.title if math.isnan(self.chance) else f"{self.title} (chance {number(self.chance)})"

    def of(self, key: tuple[str, ...]) -> Mean:
        """The mean of a pair or a unit."""
        return self.values.get(key, Mean())


def _column(title: str, rows: Sequence[Row], *by: str) -> Column:
    return Column(title, means(rows, *by), mean_of(row.chance for row in rows).mean)


def pair_columns(analysis: Analysis) -> list[Column]:
    """A column per part and measure."""
    rows = analysis.similarity
    return [_column(named(*key), where(rows, *key), "unit1", "unit2") for key in measures(rows)]


def pairs(columns: Sequence[Column], most: int) -> tuple[list[tuple[str, ...]], int]:
    """At most so many pairs, the most and the least alike first and last, and how many were left out.

    Alike by the first subspace overlap, which depends on no basis; by the first column if there is none.
    """
    if not columns:
        return [], 0
    every = list(dict.fromkeys(pair for column in columns for pair in column.values))
    by = next((column for column in columns if not math.isnan(column.chance)), columns[0])
    every.sort(key=lambda pair: by.of(pair).mean if by.of(pair).known else -math.inf, reverse=True)
    if len(every) <= most:
        return every, 0
    return every[: most - most // 2] + every[-(most // 2) :], len(every) - most


def unit_columns(analysis: Analysis) -> list[Column]:
    """Changes against each start, then ranks and norms."""
    columns = []
    for key in measures(analysis.changes):
        wanted = ("relative_magnitude", "direction") if key[0] == "W" else ("magnitude", "direction", "overlap")
        for unit2 in origins(analysis.changes, *key) if key[1] in wanted else ():
            columns.append(_column(f"{named(*key)}, from {unit2}", where(analysis.changes, *key, unit2), "unit1"))
    for part, measure in measures(analysis.norms):
        if measure == "effective_rank" or (measure == "frobenius" and part.startswith(("sBA", "lambda"))):
            columns.append(_column(named(part, measure), where(analysis.norms, part, measure), "unit1"))
    return columns


class Group(NamedTuple):
    """What was left out for one reason."""

    part: str
    measure: str
    reason: str
    units: list[tuple[str, ...]]
    modules: list[str]


def groups(analysis: Analysis) -> list[Group]:
    """What was not compared, by reason; those that concern most modules first."""
    found: dict[tuple[str, str, str], tuple[dict[tuple[str, ...], None], dict[str, None]]] = {}
    for one, two, part, measure, reason, modules in analysis.skipped:
        units, names = found.setdefault((part, measure, reason), ({}, {}))
        units[(one, two) if two else (one,)] = None
        names.update(dict.fromkeys(modules))
    made = [Group(*key, list(units), list(names)) for key, (units, names) in found.items()]
    return sorted(made, key=lambda group: -len(group.units) * max(1, len(group.modules)))


def _missing(group: Group) -> tuple[object, ...]:
    return (
        group.reason,
        "everything" if group.part == "all" else group.part,
        "every measure" if group.measure == "all" else group.measure.replace("_", " "),
        which(group.units),
        len(group.modules) or "–",
        group.modules[0] if group.modules else "–",
    )


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


def which(units: Sequence[tuple[str, ...]], most: int = 2) -> str:
    """Pairs or units by name, the first few of many."""
    return listed((" with ".join(unit) for unit in units), most)
