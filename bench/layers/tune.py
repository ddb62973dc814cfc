"""`python -m bench tune`: measure tiles and plans on this GPU and write them to `alora_kernels/kernels/tuned.py`.

First the tiles, then, with the best tiles in place, the plans: the forward plan by the time of the forward, dx and
overlap by what forward + backward takes beyond it. `--check` only compiles all candidates for a chip, without a GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from alora_kernels import kernels as ak
from alora_kernels.kernels import tuned
from alora_kernels.kernels.tiles import Tile, chip_of, override_tiles
from alora_kernels.ops.dispatch import PLANS, Plan

from ..report.rows import BOTH, FORWARD, GRAPH, origin
from ..run import Check, Ready, choose
from ..static import aot
from ..timing import CudaClock, Timing, interleaved, release
from . import candidates
from .layer import layer_work
from .problem import Case
from .providers import find

TABLE = Path(tuned.__file__)
GAIN = 1.01  # how much faster a challenger must be: below that it is noise
console = Console()

Tiles = dict[tuple[str, str, int, str], tuple[Any, ...]]
Plans = dict[tuple[str, str, int, str], tuple[str, str, bool]]


def error(got: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Largest error of any tensor, relative to its largest entry."""
    return max(
        (float((g.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)) for g, t in zip(got, truth, strict=True)),
        default=math.inf,
    )


def try_tiles(kernel: str, shapes: str, repeats: int) -> tuple[Tile, dict[Tile, str]]:
    """Verify and time the candidates of a kernel; the best, and a word about each."""
    trial = candidates.trial(kernel, shapes, "cuda")
    truth, own = trial.formula(lambda t: t.double()), trial.formula(lambda t: t)
    allowed = 2 * error(own, truth) + torch.finfo(torch.bfloat16).eps

    def prepared(tile: Tile) -> Ready:
        def run() -> tuple[Tensor, ...]:
            with override_tiles({kernel: tile}):
                return trial.run()

        found = error(run(), truth)
        return Ready(run, Check(found, allowed, f"error {found:.1e}, allowed {allowed:.1e}"))

    tiles = candidates.TILES[kernel]
    times, said = timed({tile: partial(prepared, tile) for tile in tiles}, repeats)
    said |= {tile: f"{1e3 * p50:.4f} ms" for tile, p50 in times.items()}
    return pick(times, tiles[0]), said


def timed(prepares: Mapping[Any, Callable[[], Ready]], repeats: int) -> tuple[dict[Any, float], dict[Any, str]]:
    """Seconds of all that are right, and a word about each that is not."""
    runs, said = {}, {}
    for name, prepare in prepares.items():
        try:
            ready = prepare()
        except Exception as problem:  # what does not fit or compile is a line, not the end
            said[name] = f"failed: {type(problem).__name__}"
            continue
        if ready.check.ok:
            runs[name] = ready.run
        else:
            said[name] = f"wrong: {ready.check.where}"
    timings = interleaved(runs, repeats=repeats, clock=CudaClock())
    return {name: t.p50 for name, t in timings.items() if isinstance(t, Timing)}, said


def pick(times: Mapping[Any, float], current: Any) -> Any:
    """The fastest, but what is in use unless that is beaten by more than noise."""
    best = min(times, key=lambda name: times[name])
    return current if current in times and times[current] <= GAIN * times[best] else best


def pick_plan(forward: Mapping[str, float], both: Mapping[str, float]) -> Plan:
    """The plan of the fastest parts, from seconds by plan: forward by itself, dx and overlap by the backward's."""
    first = PLANS[pick(forward, "two_launch")].forward
    backward = {name: both[name] - forward[name] for name in both if name in forward}
    rest = PLANS[pick(backward, "two_launch")] if backward else PLANS["two_launch"]
    return Plan(first, rest.dx, rest.overlap)


def try_plans(routing: str, shapes: str, repeats: int) -> tuple[Plan, dict[str, str]]:
    m, k, n = candidates.SHAPES[shapes]
    decoding = shapes.startswith("decode")
    case = Case(
        shapes, routing, m=m, k=k, n=n, e=m if decoding and routing == "task" else candidates.E, r=candidates.R,
        dtype=torch.bfloat16, layout="rows" if decoding else "runs", device="cuda",
    )  # fmt: skip
    directions = [FORWARD] if decoding else [FORWARD, BOTH]
    work = layer_work(case, find([f"fused:{name}" for name in PLANS]), directions)
    seconds: dict[str, dict[str, float]] = {}
    said: dict[str, str] = {}
    for direction in directions:
        found = {c.name.removeprefix("fused:"): partial(c.prepare, direction, GRAPH) for c in work.candidates()}
        seconds[direction], refused = timed(found, repeats)
        said |= refused
    for name, p50 in seconds[FORWARD].items():
        whole = seconds.get(BOTH, {}).get(name)
        said[name] = f"forward {1e3 * p50:.4f} ms" + (f", with backward {1e3 * whole:.4f} ms" if whole else "")
    return pick_plan(seconds[FORWARD], seconds.get(BOTH, {})), said


def render(measured: str, plans: Plans, tiles: Tiles) -> str:
    def table(name: str, note: str, kind: str, rows: Mapping[Any, Any]) -> str:
        body = "".join(f"    {key!r}: {value!r},\n" for key, value in sorted(rows.items()))
        return f"# {note}\n{name}: {kind} = " + ("{\n" + body + "}\n" if body else "{}\n")

    key = "dict[tuple[str, str, int, str], tuple["
    return (
        '"""What was measured to be fastest, per chip and class of shapes. Written by `python -m bench tune`; do not'
        " edit.\n\n"
        'Where a chip or class of shapes is missing, `ops.dispatch` and `kernels.tiles` follow their rules.\n"""\n\n'
        "from __future__ import annotations\n\nfrom typing import Any\n\n"
        f"MEASURED: str = {measured!r}  # device, versions, commit and date of the measurement\n"
        + table(
            "PLANS",
            "(chip, routing, bytes per element, class of shapes) -> (forward, dx, overlap)",
            f"{key}str, str, bool]]",
            plans,
        )
        + table(
            "TILES", "(kernel, chip, bytes per element, class of shapes) -> fields of a Tile", f"{key}Any, ...]]", tiles
        )
    )


def show(title: str, said: Mapping[Any, str], best: Any) -> None:
    table = Table("candidate", "measured", title=title, title_justify="left")
    for name, words in said.items():
        table.add_row(str(name), words, style="bold green" if name == best else None)
    console.print(table)


def check_candidates(chip: str, workers: int) -> list[tuple[str, str, aot.Row]]:
    """Compile every candidate for a chip, without a GPU: (kernel, tile, what the compiler said)."""
    named: list[tuple[str, str, aot.Job]] = []
    for kernel, tiles in candidates.TILES.items():
        for tile in tiles:
            with ak.recording(chip) as launches, override_tiles({kernel: tile}):
                candidates.trial(kernel, candidates.classes(kernel)[0], "meta").run()
            named.append((kernel, str(astuple(tile)), aot.to_job(chip, launches[0])))
    rows = aot.compile_all([job for _, _, job in named], workers)
    return [(kernel, tile, row) for (kernel, tile, _), row in zip(named, rows, strict=True)]


def print_check(chip: str, workers: int) -> None:
    table = Table("kernel", "tile", "registers", "spilled", "shared", "programs per processor", "verdict")
    for kernel, tile, row in check_candidates(chip, workers):
        verdict = row.error or ("spills" if row.spilled else "does not fit" if row.programs < 1 else "ok")
        cells = (row.registers, row.spilled, f"{row.shared:,}", row.programs, verdict.splitlines()[0][:60])
        table.add_row(kernel, tile, *map(str, cells), style=None if verdict == "ok" else "red")
    console.print(f"{chip}: fields are block_m, block_n, block_k, warps, stages, parts")
    console.print(table)


def measure(kernels: Sequence[str], plans: bool, repeats: int, new_tiles: Tiles, new_plans: Plans) -> None:
    """Fill the tables with the best tiles and, if wanted, plans; what is there at an interrupt was measured."""
    chip = chip_of(torch.device("cuda", torch.cuda.current_device()))
    for name, shapes in track([(i, s) for i in kernels for s in candidates.classes(i)], "tiles", transient=True):
        best, said = try_tiles(name, shapes, repeats)
        show(f"{name}, {shapes}", said, best)
        new_tiles[name, chip, 2, "" if name in candidates.CLASSLESS else shapes] = astuple(best)
        release()
    tuned.TILES.update(new_tiles)  # plans are measured with the best tiles
    for routing, shapes in [(r, s) for r in ("task", "soft") for s in candidates.SHAPES] if plans else []:
        plan, heard = try_plans(routing, shapes, repeats)
        show(f"plans, {routing} routing, {shapes}: {plan}", heard, None)
        new_plans[chip, routing, 2, shapes] = tuple(plan)  # type: ignore[assignment]
        release()


def main(
    kernel: Annotated[list[str] | None, typer.Option(help="tune the tiles of these kernels only; repeatable")] = None,
    plans: Annotated[bool, typer.Option(help="measure plans after the tiles")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 40,
    write: Annotated[bool, typer.Option(help="write the winners to the table; else only print them")] = True,
    out: Annotated[Path, typer.Option(help="the table")] = TABLE,
    check: Annotated[str | None, typer.Option(help="only compile the candidates for this chip, e.g. sm_90")] = None,
    workers: Annotated[int, typer.Option(help="compiler processes of --check")] = min(os.cpu_count() or 1, 8),
) -> None:
    """Choose tiles and plans by measurement on this GPU, and write the table that the kernels read."""
    if check is not None:
        if check not in aot.CHIPS:
            raise typer.BadParameter(
                f"unknown chip {check!r}: choose from {', '.join(aot.CHIPS)}", param_hint="--check"
            )
        print_check(check, workers)
        return
    kernels = choose("kernel", kernel, list(candidates.TILES))
    if not torch.cuda.is_available():
        typer.echo("error: no CUDA device here. `python -m bench tune --check sm_90` compiles the candidates", err=True)
        raise typer.Exit(1)
    run, new_tiles, new_plans, interrupted = origin("cuda", "triton"), Tiles(), Plans(), False
    try:
        measure(kernels, plans, repeats, new_tiles, new_plans)
    except KeyboardInterrupt:
        interrupted = True
    measured = f"{run['device']}, torch {run['torch']}, triton {run['triton']}, commit {run['commit']}, {run['date']}"
    text = render(measured, {**tuned.PLANS, **new_plans}, {**tuned.TILES, **new_tiles})
    if write:
        out.write_text(text)
    console.print(f"{'interrupted; ' if interrupted else ''}{len(new_tiles)} tiles and {len(new_plans)} plans "
                  + (f"are in {out}" if write else "were measured, none written"))  # fmt: skip
    if interrupted:
        raise typer.Exit(130)
