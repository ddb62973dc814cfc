"""The record of `bench serving`, medians over repeats, and what is asked for.

In:   one repeat of one provider under one load.
Out:  `Row`, a line of a `bench.report.sheet.Sheet`; `medians` of the repeats; `judge`d goals.
Who:  `bench.serving.command` writes and shows, `bench.serving.figure` draws.

A row per repeat, not per median: an interrupted run keeps what it measured. Ratios are taken inside one run (`date`).
The CSV lies in `results/serving/`, because `bench plot` reads every CSV of `results/` and knows one kind of row.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..report.machine import origin, slug
from ..report.rows import OK, RESULTS

FOLDER = RESULTS / "serving"
OURS, BASE = "ours, mixed batches", "ours, base alone"
SERIAL, MERGED, MIXED = "one task at a time", "one task at a time, merged", "PEFT mixed generate"
PROVIDERS = (OURS, BASE, SERIAL, MERGED, MIXED)


@dataclass(frozen=True)
class Row:
    """One repeat of one provider under one load.

    Attributes:
        command, commit, date, device, torch, transformers, peft: of the run; `date` is its start.
        model, dtype, r: base model, dtype of everything, rank of the adapters.
        provider: one of `PROVIDERS`.
        popularity, tasks: which of how many tasks a request asks for, see `serving_load`.
        concurrency, requests, new_tokens: requests in flight, in all, and tokens generated for each.
        repeat: 0, 1, ...
        tokens_per_second: generated tokens over the wall time from the first submission to the last end.
        first_p50_ms, first_p95_ms: from a request's arrival to its first token.
        latency_p50_ms, latency_p95_ms: from a request's arrival to its end.
        batch_mean: requests in service, averaged over the wall time.
        adapter_mb: what the weights of all tasks take, the shared B once; for PEFT a LoRA per task.
        checked, equal: tokens compared with stock PEFT, and the share that is its most likely token; the others are
            ties within rounding, or the row is "wrong".
        status: "ok", "wrong", "not available: ..." or "failed: ...".
        note: what a reader must know.
    """

    command: str = "serving"
    commit: str = ""
    date: str = ""
    device: str = ""
    torch: str = ""
    transformers: str = ""
    peft: str = ""
    model: str = ""
    dtype: str = ""
    r: int = 0
    provider: str = ""
    popularity: str = ""
    tasks: int = 0
    concurrency: int = 0
    requests: int = 0
    new_tokens: int = 0
    repeat: int = 0
    tokens_per_second: float | None = None
    first_p50_ms: float | None = None
    first_p95_ms: float | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    batch_mean: float | None = None
    adapter_mb: float | None = None
    checked: int = 0
    equal: float | None = None
    status: str = OK
    note: str = ""

    @property
    def key(self) -> Key:
        """What was measured, whatever the repeat."""
        return self.provider, self.popularity, self.tasks


Key = tuple[str, str, int]
NUMBERS = tuple(field.name for field in fields(Row) if field.type == "float | None")


def run_row(device: str, model: str, r: int) -> Row:
    """An otherwise empty row with the columns that are the same for a whole run."""
    return Row(model=model, dtype="float32", r=r, **origin("serving", device))


def csv_of(row: Row) -> Path:
    """Where the rows of this machine and model go."""
    machine = slug(row.device.split(",")[0])
    return FOLDER / f"{machine}-{slug(Path(row.model).name)}.csv"


def newest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last run."""
    last = max((row.date for row in rows), default="")
    return [row for row in rows if row.date == last]


def medians(rows: Iterable[Row]) -> dict[Key, Row]:
    """One row per thing measured: the median of each number over its repeats; a repeat that is not ok stands for all.

    A single wrong repeat makes the whole wrong: a median must not hide it.
    """
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    found = {}
    for key, same in groups.items():
        bad = next((row for row in same if row.status != OK), None)
        middle: dict[str, Any] = {name: _median([getattr(row, name) for row in same]) for name in NUMBERS}
        found[key] = bad or replace(same[0], repeat=len(same), **middle)
    return found


@dataclass(frozen=True)
class Goal:
    """A ratio of tokens per second that is asked for.

    Attributes:
        above, below: provider, popularity and number of tasks of numerator and denominator.
        must: the least it must be; None only reports.
    """

    above: Key
    below: Key
    must: float | None = None

    @property
    def ratio_of(self) -> str:
        """What is divided by what, in words."""
        (name, _, tasks), (other, popularity, others) = self.above, self.below
        if name == other:
            return f"{name}, {popularity}: {tasks} tasks / {others}"
        return f"{name} / {other}, {popularity} over {others}"


def goals(tasks: Sequence[int], target: int) -> list[Goal]:
    """What is asked of mixed batches.

    Args:
        tasks: numbers of tasks that are measured.
        target: the number of tasks at which the alternatives are compared, 16.
    """
    here = ("uniform", target)
    wanted = [Goal((OURS, *here), (name, *here), must) for name, must in ((SERIAL, 3.0), (MERGED, 3.0), (MIXED, 1.5))]
    wanted.append(Goal((OURS, *here), (BASE, *here)))
    few, many = min(tasks), max(tasks)
    if few < many:
        wanted.append(Goal((OURS, "uniform", many), (OURS, "uniform", few), 0.9))
    return wanted


def judge(goal: Goal, found: dict[Key, Row]) -> float | str:
    """The ratio, or why there is none."""
    values = []
    for key in (goal.above, goal.below):
        row = found.get(key)
        if row is None or row.tokens_per_second is None or row.status != OK:
            return f"{key[0]}, {key[2]} tasks: {'not run' if row is None else row.status}"
        values.append(row.tokens_per_second)
    return values[0] / values[1]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
