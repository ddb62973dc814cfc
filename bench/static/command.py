"""What every kernel costs before it ever runs: launches against the roofline, and what the compiler made of it.

`python -m bench static`, without a GPU and without `TRITON_INTERPRET`. The table of a release is kept: `python -m bench
static --csv bench/results/static/compiled.csv`.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from alora_kernels.plotting import check_matplotlib

from ..report import tables
from ..report.rows import commit, grouped
from ..run import checked
from .aot import Row, compile_all, jobs, kernel_names
from .cubin import CHIPS
from .roofline import Prediction, Rates, draw, predict_all


def worst(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One record per chip and kernel: the worst of its variants."""
    records = []
    for same in grouped(rows, lambda row: (row.chip, row.kernel)):
        least = min(same, key=lambda row: row.programs)
        tensor = Counter[str]()
        for row in same:
            tensor.update(row.tensor)
        record: dict[str, Any] = {"chip": least.chip, "kernel": least.kernel, "variants": len(same)}
        record |= {n: max(getattr(r, n) for r in same) for n in ("registers", "spilled", "shared", "shared_limit")}
        record |= {"programs": least.programs, "limited_by": least.limit, "tensor": _mnemonics(tensor)}
        record |= {n: sum(getattr(r, n) for r in same) for n in ("bulk", "copies", "atomics")}
        bad = {"failed": sum(bool(r.error) for r in same), "hazards": sum(len(r.hazards) for r in same)}
        records.append(record | bad)
    return records


def _mnemonics(tensor: dict[str, int]) -> str:
    """`"HGMMA 42, HMMA 3"`; the twelve names AMD has by type and shape are one."""
    sums = Counter[str]()
    for name, times in tensor.items():
        sums["v_mfma" if name.startswith("v_") else name] += times
    return ", ".join(f"{name} {times}" for name, times in sums.items())


def compiled_table(rows: Sequence[Row], *, every: bool) -> Table:
    """One line per chip and kernel, the worst of its variants, or a line for every variant."""
    table = tables.table(
        "compiled: all variants" if every else "compiled: the worst of each kernel's variants",
        ["chip", "kernel", "variant" if every else "variants", "limited by", "tensor-core instructions"],
        ["registers", "spilled B", "shared B", "programs", "tile copies", "async copies", "atomics"],
        caption="programs: that fit on one multiprocessor. Instruction counts are sums over the variants' code, loops"
        " once.",
    )
    for same in [[row] for row in rows] if every else grouped(rows, lambda row: (row.chip, row.kernel)):
        (r,), first = worst(same), same[0]
        said = "; ".join([first.error or first.limit, *first.hazards])
        name, limit = (first.variant, said) if every else (r["variants"], r["limited_by"])
        sizes = (r["registers"], r["spilled"], f"{r['shared']:,}", r["programs"], r["bulk"], r["copies"], r["atomics"])
        style = "red" if any(row.bad for row in same) else None
        table.add_row(*map(str, (r["chip"], r["kernel"], name, limit, r["tensor"], *sizes)), style=style)
    return table


def predictions(found: Sequence[Prediction], rates: Rates) -> Table:
    assumed = f"{rates.tflops:g} TFLOP/s, {rates.tbps:g} TB/s, {rates.launch_us:g} us a launch"
    table = tables.table(
        "PREDICTED, not measured: launches against the roofline (R = 16, E = 8, bf16, sm_90)",
        ["routing", "M x K -> N", "pass", "plan"],
        ["launches", "of torch", "GFLOP", "fewest MiB", "moved MiB", "predicted us", "frozen us", "x frozen"],
        caption=f"Assumed: {assumed}, our products at {rates.ours:g} of torch's speed. Time: for each launch, the"
        " larger of products and memory, plus the launch; two that overlap (+pdl) are one at best. * is what the op"
        " takes when no plan is asked for.",
    )
    for same in grouped(found, lambda p: (p.layer, p.direction)):
        for p in same:
            left = (p.layer.routing, p.layer.shape, p.direction, p.plan + (" *" if p.default else ""))
            counts = (len(p.steps), sum(not step.ours for step in p.steps))
            sizes = (f"{p.flops / 1e9:,.1f}", f"{p.fewest / 2**20:,.1f}", f"{p.moved / 2**20:,.1f}")
            times = (f"{p.microseconds:,.1f}", f"{p.frozen:,.1f}", f"{p.ratio:.3f}")
            table.add_row(*left, *map(str, counts), *sizes, *times)
        table.add_section()
    return table


def launches(found: Sequence[Prediction], rates: Rates) -> Table:
    left = ["routing", "M x K -> N", "pass", "plan", "launch", "grid"]
    table = tables.table("PREDICTED, not measured: every launch", left, ["GFLOP", "moved MiB", "predicted us"])
    for p in found:
        for step in p.steps:
            cells = (p.layer.routing, p.layer.shape, p.direction, p.plan, step.name, " x ".join(map(str, step.grid)))
            more = (f"{step.flops / 1e9:,.2f}", f"{step.moved / 2**20:,.2f}", f"{step.microseconds(rates):,.1f}")
            table.add_row(*cells, *more)
        table.add_section()
    return table


def records(found: Sequence[Prediction], rates: Rates) -> Iterator[dict[str, Any]]:
    """Predictions as JSON: flat, with their launches."""
    for p in found:
        flat = asdict(p.layer) | {"pass": p.direction, "plan": p.plan, "default": p.default}
        flat |= {"flops": p.flops, "fewest_bytes": p.fewest, "moved_bytes": p.moved}
        flat |= {"predicted_us": p.microseconds, "frozen_us": p.frozen, "ratio": p.ratio}
        yield flat | {"launches": [asdict(step) | {"predicted_us": step.microseconds(rates)} for step in p.steps]}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The table of the worst variants, with the code and compiler it belongs to."""
    stamp = {"commit": commit(), "date": date.today().isoformat(), "triton": triton.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [stamp | record for record in worst(rows)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _known(kind: str, asked: Collection[str], known: Collection[str]) -> None:
    for name in asked:
        if name not in known:
            raise typer.BadParameter(f"unknown {kind} {name!r}: choose among {', '.join(known)}")


def _compile(chips: Sequence[str], kernels: Sequence[str], workers: int) -> list[Row]:
    _known("chip", chips, CHIPS)
    _known("kernel", kernels, kernel_names())
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("TRITON_INTERPRET is set: the interpreter compiles nothing, unset it")
    todo = list(jobs(chips or tuple(CHIPS), kernels))
    if not todo:
        raise typer.BadParameter(f"{', '.join(kernels)} is not launched on {', '.join(chips)}")
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("compiling", total=len(todo))
        return compile_all(todo, workers, lambda number: progress.advance(bar, number))


def main(
    chips: Annotated[list[str] | None, typer.Option("--chip", help="only this chip; may be repeated")] = None,
    kernels: Annotated[list[str] | None, typer.Option("--kernel", help="only this kernel; may be repeated")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="a line per variant and per launch")] = False,
    roofline_only: Annotated[bool, typer.Option("--roofline-only", help="predictions alone: no compilation")] = False,
    tflops: Annotated[float, typer.Option(help="assumed rate of bf16 products, TFLOP/s", min=1e-3)] = 790.0,
    tbps: Annotated[float, typer.Option(help="assumed rate of memory, TB/s", min=1e-3)] = 4.3,
    launch_us: Annotated[float, typer.Option(help="assumed cost of a launch, microseconds", min=0.0)] = 3.0,
    ours: Annotated[float, typer.Option(help="assumed speed of our products, relative to torch's", min=1e-3)] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything here, print nothing")] = None,
    figure: Annotated[Path | None, typer.Option(help="draw the predictions here (PNG; needs matplotlib)")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write the table of compiled kernels here")] = None,
    workers: Annotated[int, typer.Option(help="compiler processes", min=1)] = min(os.cpu_count() or 1, 8),
) -> None:
    """Predict each plan's time, and compile every kernel variant for every chip (some minutes, no GPU)."""
    rates = Rates(tflops, tbps, launch_us, ours)
    # who asks for one chip or kernel wants to see what the compiler says of it
    found = [] if chips or kernels else list(predict_all(rates))
    if found and figure is not None:
        checked(None, check_matplotlib, "the figure needs matplotlib: pip install matplotlib")
        draw(found, figure, rates)
    if found and json_file is None:
        tables.console().print(launches(found, rates) if show_all else predictions(found, rates))
    rows = [] if roofline_only else _compile(chips or (), kernels or (), workers)
    if csv_file is not None and rows:
        write_csv(csv_file, rows)
    if json_file is not None:
        compiled = [asdict(row) for row in rows]
        json_file.write_text(json.dumps({"compiled": compiled, "roofline": list(records(found, rates))}, indent=1))
    elif rows:
        tables.console().print(compiled_table(rows, every=show_all))
    if any(row.error for row in rows) or (json_file is None and any(row.bad for row in rows)):
        raise typer.Exit(1)
