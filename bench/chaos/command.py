"""`python -m bench chaos`: attacks on a server, on trainings and on federated runs; nothing may be lost, wrong or grow.

A row per attack in bench/results/chaos/chaos.csv, on disk as it comes; docs/security.md shows the newest of each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..report import tables
from ..report.readme import linked, replace_block
from ..report.rows import RESULTS, ROOT, origin, slug
from ..report.sheet import Sheet, read
from ..run import checked, choose
from . import disk, fuzz, kills, slow, storms
from .arena import LONG, QUICK, Arena, Found, arena
from .rows import Row, block, table

Storm = Callable[[Arena, int], Coroutine[Any, Any, Found]]
PAGE, BLOCK = ROOT / "docs" / "security.md", "bench-chaos"


@dataclass(frozen=True)
class Attack:
    """`acts` of them in a long run and in a quick one; on the server (`storm`), or in a folder of its own (`alone`)."""

    unit: str
    acts: int
    quick: int
    storm: Storm | None = None
    alone: Callable[[Path, Random, int], Found] | None = None


ATTACKS = {
    "clients leave": Attack("disconnects, ten at once", 1000, 20, storms.disconnects),
    "tasks change": Attack("replacements, loads and unloads", 250, 8, storms.replaced),
    "folders rewritten": Attack("rewrites in place while loading", 200, 4, disk.rewritten),
    "damaged folders": Attack("flipped bits, cut and sparse files", 400, 10, disk.damaged),
    "full disk": Attack("loads without room", 12, 2, disk.full_disk),
    "fuzzed bodies": Attack("requests", 3000, 60, fuzz.bodies),
    "unfinished requests": Attack("connections, twice", 60, 6, slow.unfinished),
    "stopped": Attack("times SIGSTOP", 20, 2, storms.stopped),
    "crowd": Attack("streams at once, twice", 1000, 30, storms.streams),
    "churn": Attack("loads and unloads", 10_000, 20, storms.churned),
    "spill removed": Attack("removals", 12, 2, disk.spill_removed),
    "killed": Attack("times SIGKILL", 5, 1, storms.killed),
    "training killed": Attack("times SIGKILL", 30, 1, alone=kills.training),
    "federated run killed": Attack("times SIGKILL", 30, 1, alone=kills.federated),
    "fuzzed replies": Attack("replies", 5000, 100, alone=fuzz.replies),
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(ATTACKS)}; repeatable; default all")] = None,
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="few acts on fewer tasks; growth is not judged")] = False,
    out: Annotated[Path, typer.Option(help="CSV")] = RESULTS / "chaos" / "chaos.csv",
    page: Annotated[Path, typer.Option(help=f"its block {BLOCK} is rewritten, but for --quick")] = PAGE,
) -> None:
    """Attack a server, trainings and federated runs (half an hour); exit code 1 if anything is lost, wrong or grows."""
    names, console = choose("only", only, list(ATTACKS)), tables.console()
    sheet: Sheet[Row] = checked("--out", Sheet, out, Row)
    rows, errors = [], Console(stderr=True)
    with errors.status("") as status:
        for row in attacked(names, seed, quick, status.update):
            sheet.add(row)
            rows.append(row)
            errors.print(f"{row.attack}: {'held' if row.held else 'DID NOT HOLD'}; {row.note}", soft_wrap=True)
    console.print(table(rows))
    console.print(sheet.summary)
    if not quick:
        text = block(read(out, Row), linked(out, page.parent))
        page.write_text(replace_block(page.read_text(), BLOCK, text))
        console.print(f"rewrote the block {BLOCK} of {page}", soft_wrap=True)
    if not all(row.held for row in rows):
        raise typer.Exit(1)


def attacked(names: Sequence[str], seed: int, quick: bool, show: Callable[[str], None]) -> Iterator[Row]:
    """A row per attack; what fails with an exception is a row with something lost."""
    torch.set_num_threads(1)
    size, chosen = (QUICK if quick else LONG), {name: ATTACKS[name] for name in names}
    row = partial(_row, seed=seed, quick=quick)
    with TemporaryDirectory(prefix="bench-chaos-") as home, ExitStack() as stack:
        place: Arena | None = None
        for name, attack in chosen.items():
            show(name)
            if attack.storm and place is None:
                stack.enter_context(disk.small_disk(Path(home) / "server" / "tmp"))
                place = stack.enter_context(arena(Path(home), size, seed, show))
            if attack.storm and place is not None:
                yield row(name, attack, partial(_storm, place, attack.storm))
            elif attack.alone:
                yield row(name, attack, partial(attack.alone, Path(home) / slug(name), Random(seed)))


def _storm(place: Arena, storm: Storm, acts: int) -> Found:
    """One attack; a server that it has ended is started again for the next."""
    try:
        return asyncio.run(storm(place, acts))
    finally:
        if place.server.away or place.server.ended:
            place.server.start()
            asyncio.run(place.reset())


def _row(name: str, attack: Attack, run: Callable[[int], Found], *, seed: int, quick: bool) -> Row:
    facts, begin, acts = origin("cpu"), time.perf_counter(), attack.quick if quick else attack.acts
    try:
        found = run(acts)
    except Exception as error:
        found = {"tried": acts, "lost": acts, "note": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
    row = Row(attack=name, seed=seed, acts=acts, unit=attack.unit, seconds=time.perf_counter() - begin, **facts)
    return replace(row, **found)
