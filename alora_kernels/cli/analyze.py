"""`alora analyze`: tables, CSV files, figures and a page about what adapters learned and how far they moved."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..recipes import display
from ..recipes.display import say
from ..text import counted
from . import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..analysis.report import Column
    from ..analysis.table import Analysis

PATIENCE = 2.0  # seconds before a bar appears
PAIRS, REASONS, UNITS, COLUMNS = 12, 5, 24, 3  # of a table on the terminal; the page has more, the files have all


def analyze(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="adapter folders (ALoRA, LoRA, VeRA, ...), federated runs, or clients of one", metavar="DIR..."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="folder for CSV files, figures and report.html; an earlier analysis is replaced")
    ] = Path("analysis"),
    init: Annotated[
        Path | None, typer.Option(help="what they were trained from, to measure the change", metavar="DIR")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="the base, to measure W0 against W0 + s B A: smollm2-135m, a folder, a hub id", metavar="MODEL"
        ),
    ] = None,
    figures: Annotated[bool, typer.Option(help="draw figures (needs matplotlib)")] = True,
) -> None:
    """Compare adapters, tasks or clients, layer by layer: how alike, how far from the start, of which rank.

    Writes similarity.csv, changes.csv, norms.csv, not_compared.csv, figures and one page, report.html.

    Examples:

    alora analyze runs/demo/adapter   (the tasks of one ALoRA adapter)

    alora analyze lora-math lora-code --base smollm2-135m --out look   (two LoRAs, and the weights they change)

    alora analyze runs/fed --init runs/start   (the clients of a federated run, against what they began with)
    """
    with command():
        from .. import data
        from ..analysis.comparison import compare_units
        from ..analysis.figures import check_matplotlib
        from ..analysis.report import write_report
        from ..analysis.sources import units

        if figures:
            check_matplotlib()
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file: give the path of a folder")
        found = [unit for folder in folders for unit in units(folder)]
        start = units(init) if init is not None else None
        model = None
        if base is not None:
            with display.err.status(f"loading {base} ..."):
                model = data.load_model(base)[0]
        with _bar("comparing", "modules") as moved:
            study = compare_units(found, start, model, progress=moved)
        study.save(out)
        with display.err.status("drawing ..." if figures else "writing ..."):
            page = write_report(study, out, command=_command(folders, out, init, base, figures), figures=figures)
    _show(study, out, page)


def _command(folders: list[Path], out: Path, init: Path | None, base: str | None, figures: bool) -> str:
    """What makes the same page again."""
    words = ["alora", "analyze", *map(str, folders), "--out", str(out)]
    words += [] if init is None else ["--init", str(init)]
    words += [] if base is None else ["--base", base]
    return shlex.join(words + ([] if figures else ["--no-figures"]))


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that stays away from work that is over before it could be read."""
    began, bar = time.monotonic(), display.progress(unit)
    task = bar.add_task(what, total=None, note="")

    def moved(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if not bar.live.is_started and time.monotonic() - began > PATIENCE:
            bar.start()

    try:
        yield moved
    finally:
        if bar.live.is_started:
            bar.stop()


def _show(study: Analysis, out: Path, page: Path) -> None:
    """The shortest tables that say something, then where the rest is."""
    from ..analysis import report

    per_pair, per_unit = report.pair_columns(study), report.unit_columns(study)
    chosen, more = report.pairs(per_pair, PAIRS)
    said = f"; {more} pairs in between are in {out / 'similarity.csv'}" if more else ""
    _tables(f"how alike: mean ± sd over modules{said}", "pair", per_pair, chosen)
    labels = [(label,) for label in study.labels[:UNITS]]
    _tables("change, rank, size: mean ± sd over modules", "unit", per_unit, labels)
    if len(study.labels) > UNITS:
        say(f"{len(study.labels) - UNITS} more units are in {page}", "dim")
    for note in study.notes:
        say(f"- {note}")
    reasons = report.groups(study)
    for group in reasons[:REASONS]:
        part = "" if group.part == "all" else f"{group.part}, "
        modules = f", {counted(len(group.modules), 'module')}" if group.modules else ""
        say(f"not compared: {part}{report.which(group.units)}{modules}: {group.reason}", "yellow")
    if len(reasons) > REASONS:
        say(f"{len(reasons) - REASONS} more reasons are in {out / 'not_compared.csv'}", "yellow")
    display.console.print()
    say(f"report: {page}")


def _tables(caption: str, name: str, columns: Sequence[Column], keys: Sequence[tuple[str, ...]]) -> None:
    """A line per key, in as many tables as it takes for numbers to stay on one line."""
    from ..analysis import report

    for start in range(0, len(columns), COLUMNS) if keys else ():
        part = columns[start : start + COLUMNS]
        rows = [[escape(" – ".join(key)), *(report.shown(c.of(key)) for c in part)] for key in keys]
        say(caption, "italic")
        display.console.print(display.table("", [name, *(escape(column.heading) for column in part)], rows))
