"""What docs/performance_serving.md says, from the CSV files of `bench serving`; its own file, for `bench plot`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..report.readme import linked, markdown, met
from ..report.rows import newest
from ..report.sheet import read
from ..report.targets import Target, Verdict, judge
from .command import SERVER_COLUMNS, TARGET, server_cells
from .rows import BASE, Repeat, medians, peer_goals
from .rows import goals as engine_goals


def of_servers(results: Path, page: Path) -> list[str]:
    """A block per CSV of `--peer`, its newest run: where it was taken, medians, and every goal, missed ones too."""
    found = []
    for path, rows in _runs(results, lambda name: name.startswith("peer-")):
        first = rows[0]
        load = f"over {first.tasks} tasks, {first.concurrency} in flight; {first.note}; medians"
        table = markdown(SERVER_COLUMNS[:3], SERVER_COLUMNS[3:], map(server_cells, rows))
        goals = peer_goals(first.tasks, max(row.busy for row in rows))
        found.append("\n".join([_about(path, first, page, load), "", *table, "", *_goals(goals, rows)]))
    return found


def of_engine(results: Path, page: Path) -> list[str]:
    """The same of an engine beside stock PEFT, tasks asked for equally often, with the figure of all popularities."""
    found = []
    for path, rows in _runs(results, lambda name: not name.startswith("peer-")):
        same = [row for row in rows if row.popularity == "uniform"]
        load = f"{rows[0].concurrency} in flight, adapters of rank {rows[0].r}; {rows[0].dtype}; medians"
        table = markdown(ENGINE_COLUMNS[:1], ENGINE_COLUMNS[1:], map(_engine_cells, sorted(same, key=_by_tasks)))
        goals = _goals(engine_goals(sorted({row.tasks for row in same}), TARGET), rows)
        picture = f"![tokens per second over the number of tasks]({linked(path.with_suffix('.png'), page)})"
        found.append("\n".join([_about(path, rows[0], page, load), "", *table, "", *goals, "", picture]))
    return found


def _runs(results: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[Path, list[Repeat]]]:
    """The CSV files with a wanted name, and the medians of the newest run in each."""
    for path in sorted((results / "serving").glob("*.csv")):
        if wanted(path.name) and (rows := medians(newest(read(path, Repeat), lambda row: ""))):
            yield path, rows


def _about(path: Path, first: Repeat, page: Path, load: str) -> str:
    return (
        f"`python -m bench {first.command}`, {first.device}, torch {first.torch}, commit {first.commit}, {first.date};"
        f" {first.model}, {first.requests} requests of {first.new_tokens} tokens, {load}; all rows:"
        f" [{path.name}]({linked(path, page)})."
    )


def _goals(goals: Iterable[Target], rows: Sequence[Repeat]) -> list[str]:
    return markdown(("ratio",), ("must", "aim", "measured", "met"), [_goal(judge(goal, rows)) for goal in goals])


ENGINE_COLUMNS = ("provider", "tasks", "tokens/s", "first token p50 / p95 ms", "latency p50 / p95 ms", "adapters MB")


def _by_tasks(row: Repeat) -> tuple[int, float]:
    return row.tasks, -(row.tokens_per_second or 0.0)


def _engine_cells(row: Repeat) -> list[str]:
    tasks = "-" if row.provider == BASE else str(row.tasks)
    if not row.timed:
        return [row.provider, tasks, row.status]
    pairs = ((row.first_p50_ms, row.first_p95_ms), (row.latency_p50_ms, row.latency_p95_ms))
    times = [" / ".join("" if ms is None else f"{ms:.0f}" for ms in pair) for pair in pairs]
    return [row.provider, tasks, f"{row.tokens_per_second:.1f}", *times, f"{row.adapter_mb or 0:.1f}"]


def _goal(verdict: Verdict) -> list[str]:
    t, number = verdict.target, verdict.measured
    found = ["not measured", verdict.reason] if number is None else [f"{number:.2f}", met(verdict)]
    return [t.ratio_of, t.bound(t.must), t.bound(t.aim), *found]
