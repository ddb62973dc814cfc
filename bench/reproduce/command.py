"""`python -m bench reproduce NAME`: run an experiment, or take up again one that was interrupted.

In:   the name of a configuration or a path; seeds.
Out:  rows in the CSV, the figure and the tables anew; the exit status.
Who:  `bench.__main__`, `make reproduce`.

A seed of a case that the CSV has already, with the same settings, is not run again. Ctrl-C keeps what is finished.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alora_kernels.data import MissingPackageError

from ..report.rows import ROOT
from ..report.sheet import Sheet, read
from ..run import INTERRUPTED
from . import docs
from .claims import table as claim_table
from .config import Config, available, load
from .docs import RESULTS, module_of
from .rows import DONE, Row, done, finished, stamped

console = Console()


def units(config: Config, kind: Any, rows: Sequence[Row]) -> list[tuple[int, str]]:
    """(seed, case) of what is still to do, seed by seed."""
    known = done(rows, config)
    return [(seed, case) for seed in config.seeds for case in kind.cases(config) if (seed, case) not in known]


def perform(config: Config, out: Path) -> bool:
    """Run what is missing and draw the figure; False after Ctrl-C.

    Args:
        config: the settings.
        out: the CSV; the figure is beside it.
    """
    from alora_kernels.recipes.display import quiet  # it loads transformers

    quiet()
    kind = module_of(config.experiment)
    sheet: Sheet[Row] = Sheet(out, Row)
    todo, complete = units(config, kind, read(out, Row)), True
    names = ("[bold]{task.description}", "{task.fields[note]}")
    bar = Progress(
        TextColumn(names[0]),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn(names[1]),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(config.experiment, total=len(todo), note="")
        try:
            for seed, case in todo:
                bar.update(task, note=f"seed {seed}, {case}")
                start = time.perf_counter()
                rows = kind.run(config, seed, case)
                rows.append(Row(measure=DONE, value=time.perf_counter() - start))
                for row in stamped(rows, config, seed, case):
                    sheet.add(row)
                bar.advance(task)
        except KeyboardInterrupt:
            complete = False
    console.print(sheet.summary if complete else f"interrupted: {sheet.summary}", soft_wrap=True, highlight=False)
    found = finished(read(out, Row), config)
    if found and importlib.util.find_spec("matplotlib") is not None:
        kind.figure(found, out.with_suffix(".png"))
    for line in [*kind.table(found), "", *claim_table(kind.claims(found))] if found else []:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if len({row.seed for row in found}) < 3:
        console.print("fewer than 3 seeds: too few for a spread that means something")
    return complete


def main(
    name: Annotated[str | None, typer.Argument(help="an experiment, `paper/NAME`, or a .yaml file")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="instead of the file's; give it once for each")] = None,
    fast: Annotated[bool, typer.Option("--quick", help="tiny: tries the machinery in seconds")] = False,
    out: Annotated[Path | None, typer.Option(help="the CSV; default: bench/results/reproduction/NAME.csv")] = None,
    listed: Annotated[bool, typer.Option("--list", help="show the experiments")] = False,
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="rewrite the tables of docs/reproduction.md")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="exit 1 if docs/reproduction.md is out of date")] = False,
) -> None:
    """Run one of the papers' experiments at a small size, or write the page about all of them."""
    if listed or (name is None and not write_docs and not check):
        for known in available():
            first = module_of(load(known).experiment).__doc__.splitlines()[0]
            console.print(f"{known:24}  {first}", soft_wrap=True, highlight=False, markup=False)
        return
    complete = True
    if name is not None:
        try:
            config = load(name)
            config = dataclasses.replace(config, seeds=tuple(seeds)) if seeds else config
            config = config.quick() if fast else config
            folder = ROOT / "runs" / "reproduce-quick" if fast else RESULTS
            own = Path(name).stem if name.endswith(".yaml") else name.replace("/", "-")
            complete = perform(config, out or folder / f"{own}.csv")
        except (ValueError, OSError, ImportError, MissingPackageError) as error:
            raise typer.BadParameter(str(error).splitlines()[0], param_hint=name) from None
    if write_docs or check:
        docs.write(check=check)
    if not complete:
        raise typer.Exit(INTERRUPTED)
