"""One page that shows an analysis: what was compared, how to read it, tables, figures, what is missing and why.

In:   an `Analysis`.
Out:  `report.html`, complete in itself, and the figures as PNG beside it.
Who:  users in Python, `alora analyze`.

Names of tasks, folders and modules come from strangers: every text goes through `_text`, and the page's own policy
would run nothing even if one did not.
"""

from __future__ import annotations

import base64
import datetime
import html
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files
from ..version import __version__
from .figures import Picture, check_matplotlib, pictures
from .labels import READING
from .page import page
from .summary import NOTHING, counted, groups, pair_columns, pairs, shown, unit_columns, which

if TYPE_CHECKING:
    from .result import Analysis

PAIRS, REASONS, UNITS = 24, 40, 64  # lines of a table; the files have all
PACKAGES = ("torch", "peft", "safetensors", "numpy", "matplotlib")
_OURS = re.compile(r"(similarity(-layers)?|(changes|update)-layers|norms-units|layers-\w+-\w+|conflicts(-\d+)?)\.png")


def write_report(analysis: Analysis, folder: str | Path, *, command: str | None = None, figures: bool = True) -> Path:
    """Write figures (PNG) and `report.html`, one file without anything from elsewhere.

    Args:
        analysis: what was found.
        folder: made if needed; figures of an earlier run that this one does not have are removed.
        command: what made it, for the reader who wants to make it again.
        figures: without them matplotlib is not needed.

    Returns:
        The page.

    Raises:
        ImportError: figures are wanted and matplotlib is missing.
    """
    if figures:
        check_matplotlib()
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    drawn = list(pictures(analysis)) if figures else []
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
    names = which([(label,) for label in analysis.labels], 6)
    title = f"Inside {names}"
    sections = [
        f"<h1>{_text(title)}</h1>",
        _p(_lead(analysis), "soft"),
        _notes(analysis.notes),
        _compared(analysis),
        _pairs(analysis),
        _units(analysis),
        _reading(),
        _figures(drawn),
        _conflicts(analysis),
        _missing(analysis),
        _made(command),
    ]
    return page(_text(title), "\n".join(section for section in sections if section))


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _p(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>"


def _lead(analysis: Analysis) -> str:
    layers = {place.layer for place in analysis.places.values() if place.layer is not None}
    text = f"{counted(len(analysis.units), 'unit')}, {counted(len(analysis.places), 'module')}"
    return f"{text} in {counted(len(layers), 'layer')}." if layers else f"{text}."


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return '<div class="notes"><ul>' + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul></div>"


def _table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, wide: Sequence[str] = ()
) -> str:
    """A table that scrolls by itself; the first `left` columns are text, the others numbers; `wide` ones hold paths."""
    kinds = [' class="w"' if name in wide else "" if i < left else ' class="n"' for i, name in enumerate(head)]
    top = "".join(f'<th scope="col"{kind}>{_text(cell)}</th>' for cell, kind in zip(head, kinds, strict=True))
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
    label = _text(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _compared(analysis: Analysis) -> str:
    rows = [
        (unit.label, unit.kind, str(unit.rank or "–"), str(unit.modules), unit.base or "not said", str(unit.folder))
        for unit in analysis.units[:UNITS]
    ]
    head = ("unit", "kind", "rank", "modules", "base", "folder")
    return "<h2>What was compared</h2>" + _table("Units", head, rows, left=len(head), wide=("base", "folder"))


def _reading() -> str:
    entries = "".join(f"<dt>{_text(term)}</dt><dd>{_text(meaning)}</dd>" for term, meaning in READING)
    return f"<h2>How to read this</h2><dl>{entries}</dl>"


def _pairs(analysis: Analysis) -> str:
    columns = pair_columns(analysis)
    chosen, more = pairs(columns, PAIRS)
    if not chosen:
        return "<h2>How alike</h2>" + _p("No pair could be compared.")
    caption = "Mean over modules ± standard deviation over modules"
    if more:
        caption += f"; the most and the least alike, {more} pairs between them are in similarity.csv"
    rows = [(" – ".join(pair), *(shown(column.values.get(pair, NOTHING)) for column in columns)) for pair in chosen]
    return "<h2>How alike</h2>" + _table(caption, ("pair", *(column.heading for column in columns)), rows)


def _units(analysis: Analysis) -> str:
    columns = unit_columns(analysis)
    if not columns:
        return ""
    rows = [
        (label, *(shown(column.values.get((label,), NOTHING)) for column in columns))
        for label in analysis.labels[:UNITS]
    ]
    caption = "Mean over modules ± standard deviation over modules"
    return "<h2>How far, how large, of which rank</h2>" + _table(
        caption, ("unit", *(column.heading for column in columns)), rows
    )


def _figures(drawn: Sequence[Picture]) -> str:
    return "".join(["<h2>Figures</h2>", *map(_figure, drawn)]) if drawn else ""


def _figure(picture: Picture) -> str:
    light, dark = (base64.b64encode(data).decode() for data in (picture.light, picture.dark))
    title = _text(picture.title)
    return (
        f'<figure><h3>{title}</h3><div class="wide" tabindex="0" role="region" aria-label="{title}"><picture>'
        f'<source srcset="data:image/png;base64,{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="data:image/png;base64,{light}" style="--w:{picture.width}px" alt="{_text(picture.alt)}">'
        f"</picture></div><figcaption>{_text(picture.caption)}</figcaption></figure>\n"
    )


def _conflicts(analysis: Analysis) -> str:
    if not analysis.conflicts:
        return ""
    items = []
    for file in analysis.conflicts:
        if file.why:
            items.append(file.why)
            continue
        step, last = list(file.by_step())[-1]
        shared = [row for row in last if row.pairs]
        share = f"{100 * file.share(shared):.0f} % of its pairs of tasks" if shared else "no pairs: nothing is shared"
        items.append(f"{file.path}: {counted(len(file.rows), 'row')}; at step {step} in conflict: {share}")
    return "<h2>Gradient conflicts</h2><ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _missing(analysis: Analysis) -> str:
    """What was not compared, and why."""
    found = groups(analysis)
    head = "<h2>Not compared</h2>"
    if not found:
        return head + _p("Everything was compared with everything.")
    rows = [
        (
            group.reason,
            "everything" if group.part == "all" else group.part,
            "every measure" if group.measure == "all" else group.measure.replace("_", " "),
            which(group.units),
            str(len(group.modules)) if group.modules else "–",
            group.modules[0] if group.modules else "–",
        )
        for group in found[:REASONS]
    ]
    caption = f"{counted(len(found), 'reason')}; every pair and module count is in not_compared.csv"
    titles = ("reason", "part", "measure", "units", "modules", "first of them")
    return head + _table(caption, titles, rows, left=len(titles), wide=("units", "first of them"))


def _made(command: str | None) -> str:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = [f"alora-kernels {__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    shown_command = f"<pre><code>{_text(command)}</code></pre>" if command else ""
    return f"<h2>Made with</h2>{shown_command}" + _p(f"{', '.join(versions)}; {now}. Numbers in float64.", "soft")
