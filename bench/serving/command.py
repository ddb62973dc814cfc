"""Many tasks from one server, beside what stock PEFT can do: `python -m bench serving`.

In:   a model, how many tasks, how requests spread over them, how many at once.
Out:  rows in bench/results/serving/, a table, the goals, a figure.
Who:  people; `--quick` for a first look.

Random adapters of rank 8 on all linear layers, real prompts of 24 to 64 tokens, greedy answers of a fixed length,
float32. Every provider's tokens are compared with stock PEFT before anything is timed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..report import tables
from ..report.rows import WRONG
from ..report.sheet import Sheet
from ..session import INTERRUPTED, checked, choose
from .load import POPULARITIES, Load
from .rows import BASE, MIXED, OURS, PROVIDERS, Key, Row, csv_of, goals, judge, medians, run_row

TASKS = (1, 8, 64, 256)
TARGET = 16  # tasks at which all providers are compared; one per request in flight


@dataclass(frozen=True)
class Plan:
    """What a run measures."""

    model: str
    tasks: Sequence[int]
    popularities: Sequence[str]
    providers: Sequence[str]
    concurrency: int
    requests: int
    new_tokens: int
    r: int
    repeats: int

    def loads(self) -> list[tuple[str, Load]]:
        """Provider and load of everything to measure: over one task all popularities are the same."""
        spread = [("uniform", TARGET)]
        spread += [(p, tasks) for tasks in self.tasks for p in self.popularities if tasks > 1 or p == "uniform"]
        if 1 in self.tasks:
            spread.append(("uniform", 1))
        found = []
        for popularity, tasks in dict.fromkeys(spread):
            load = Load(popularity, tasks, self.concurrency, self.requests, self.new_tokens)
            at = {OURS: True, MIXED: popularity == "uniform"}
            found += [(name, load) for name in self.providers if at.get(name, (popularity, tasks) == spread[0])]
        return found


def main(
    model: Annotated[str, typer.Option(help="what `alora_kernels.data.load_model` takes")] = "smollm2-135m",
    tasks: Annotated[list[int] | None, typer.Option(help=f"numbers of tasks besides {TARGET}; repeatable")] = None,
    popularity: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join(POPULARITIES)}; repeatable; all by default")
    ] = None,
    provider: Annotated[list[str] | None, typer.Option(help="measure these only; repeatable")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="requests in flight")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="requests that count, per repeat")] = 48,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens generated for each")] = 24,
    r: Annotated[int, typer.Option(min=1, help="rank")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="in shuffled order; the median counts")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="1, 16 and 32 tasks, one wave of short answers, once")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV; the figure goes beside it [bench/results/serving/]")] = None,
) -> None:
    """Many tasks from one server, mixed in every batch, beside stock PEFT."""
    if any(number < 1 for number in tasks or ()):
        raise typer.BadParameter(f"numbers of tasks must be at least 1, got {tasks}", param_hint="--tasks")
    spread, numbers = choose("popularity", popularity, POPULARITIES), tasks or list(TASKS)
    if quick:
        spread, numbers, requests, new_tokens, repeats = ["uniform"], tasks or [1, 32], concurrency, 8, 1
    names = choose("provider", provider, PROVIDERS)
    plan = Plan(model, sorted(set(numbers)), spread, names, concurrency, requests, new_tokens, r, repeats)
    torch.set_num_threads(threads)
    run = run_row("cpu", model, r)
    path = out or csv_of(run)
    console = tables.console()
    sheet: Sheet[Row] = checked("--out", Sheet, path, Row)
    rows, interrupted = measure(plan, run, sheet)
    report(console, rows, plan)
    console.print(f"interrupted: {sheet.summary}" if interrupted else sheet.summary, soft_wrap=True)
    draw(console, rows, path)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row.status == WRONG for row in rows):
        raise typer.Exit(1)


def measure(plan: Plan, run: Row, sheet: Sheet[Row]) -> tuple[list[Row], bool]:
    """All rows, and whether Ctrl-C ended it."""
    from alora_kernels.data import MissingPackageError, load_model
    from alora_kernels.recipes.display import quiet

    from .adapters import Adapters, Truth, sharing
    from .load import prompts
    from .providers import Stage, providers_of
    from .run import Job, Runner

    quiet()
    console = Console(stderr=True)
    try:
        base, tokenizer = load_model(plan.model, dtype=torch.float32)
        texts = prompts(tokenizer)
    except (MissingPackageError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    loads = plan.loads()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder, console.status("adapters") as status:
        adapters = Adapters(base, max([load.tasks for _, load in loads], default=1), plan.r)
        stage = Stage(base, tokenizer, adapters, Path(folder))
        known: dict[str, Any] = providers_of(stage)
        jobs = [Job(known[name], load) for name, load in loads]
        runner = Runner(sheet, run, texts, Truth(sharing(base), adapters), status.update)
        try:
            runner.measure(jobs, plan.repeats)
        except KeyboardInterrupt:
            return runner.rows, True
        return runner.rows, False


def report(console: Console, rows: Sequence[Row], plan: Plan) -> None:
    """What was measured and what was asked for."""
    found = medians(rows)
    console.print(of_rows(found))
    table = Table(title="goals: tokens per second, ratios inside one run")
    table.add_column("ratio")
    for name in ("must", "measured", "met"):
        table.add_column(name, justify="right")
    for goal in goals(plan.tasks, TARGET):
        ratio = judge(goal, found)
        shown = ratio if isinstance(ratio, str) else f"{ratio:.2f}"
        met = goal.must is not None and not isinstance(ratio, str)
        said = ("yes" if float(ratio) >= (goal.must or 0) else "NO") if met else ""
        style = "red" if said == "NO" else None
        table.add_row(goal.ratio_of, "" if goal.must is None else f"≥ {goal.must:.2f}", shown, said, style=style)
    console.print(table)


def of_rows(found: dict[Key, Row]) -> Table:
    """Medians, by popularity and number of tasks, fastest first."""
    first = next(iter(found.values()), Row())
    table = Table(
        title=f"{first.model}, {first.concurrency} requests in flight, {first.requests} in all, "
        f"{first.new_tokens} new tokens each",
        caption=f"{first.device}, torch {first.torch}, {first.commit}; medians of the repeats; random adapters, r = "
        f"{first.r}, all linear layers",
    )
    for name in ("provider", "tasks", "popularity"):
        table.add_column(name)
    for name in ("tokens/s", "first token ms", "latency ms", "mean batch", "adapters MB", "equal tokens"):
        table.add_column(name, justify="right")
    order = {popularity: i for i, popularity in enumerate(POPULARITIES)}
    rows = sorted(found.values(), key=lambda r: (order[r.popularity], r.tasks, -(r.tokens_per_second or 0)))
    for row in rows:
        table.add_row(*_cells(row), style=_style(row))
    return table


def _cells(row: Row) -> list[str]:
    head = [row.provider, "-" if row.provider == BASE else str(row.tasks), row.popularity]
    if row.tokens_per_second is None:
        return [head[0], head[1], f"{head[2]}: {row.status} {row.note}".strip()]
    first, latency = (
        f"{getattr(row, f'{name}_p50_ms'):.0f} / {getattr(row, f'{name}_p95_ms'):.0f}" for name in ("first", "latency")
    )
    equal = "" if row.equal is None else f"{100 * row.equal:.2f} %"
    return [
        *head,
        f"{row.tokens_per_second:.1f}",
        first,
        latency,
        f"{row.batch_mean:.1f}",
        f"{row.adapter_mb:.1f}",
        equal,
    ]


def _style(row: Row) -> str | None:
    if row.status == WRONG or row.status.startswith("failed"):
        return "red"
    return "dim" if row.tokens_per_second is None else "bold" if row.provider == OURS else None


def draw(console: Console, rows: Sequence[Row], path: Path) -> None:
    """The figure, where matplotlib is and there is anything to show."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no figure: pip install matplotlib")
        return
    from .figure import plot

    if any(row.tokens_per_second for row in rows):
        plot(rows, path.with_suffix(".png"))
        console.print(f"wrote {path.with_suffix('.png')}", soft_wrap=True)
