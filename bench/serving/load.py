"""The load of `bench serving`: which prompts, which tasks, how many at once, and what came of it.

identical   every request asks for task 0, all tasks are loaded
uniform     rounds in random order: a wave of 16 requests over 16 tasks has each task once
zipf        task k with a probability proportional to (k + 1)^-1.1
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alora_kernels.text import percentile

HOST = "127.0.0.1"
STARTING = 300.0  # seconds a server may take until it is healthy
# bytes of vLLM's cache, whose default is half of the memory; ours holds the running requests alone
CACHE = 512 * 2**20
POPULARITIES = ("uniform", "zipf", "identical")
ZIPF = 1.1
SHORTEST, LONGEST = 24, 64  # tokens of a prompt
SOURCES = ("movie", "amazon", "nyt", "bbc", "spam", "tweets")


@dataclass(frozen=True)
class Load:
    """What is asked of a provider: `requests` in all, `concurrency` in flight, `new_tokens` each, whatever they are."""

    popularity: str
    tasks: int
    concurrency: int = 16
    requests: int = 48
    new_tokens: int = 24

    def warm(self) -> Load:
        return replace(self, requests=self.concurrency)


@dataclass(frozen=True)
class Request:
    """A prompt for a task; None is the base alone."""

    task: int | None
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What a request got, and seconds from its arrival to when it was taken up, its first token and its end."""

    request: Request
    tokens: tuple[int, ...]
    taken_up: float
    first_token: float
    end: float
    text: str = ""  # of a server, which does not tell ids: zeros stand in `tokens`


def prompts(tokenizer: Any, count: int = 256) -> list[tuple[int, ...]]:
    """Token ids of real test prompts of at least 24 tokens; what is longer than 64 is cut."""
    from alora_kernels.data import load_tasks

    rows = load_tasks(SOURCES, train_size=0, test_size=count)["test"]
    encoded = [tuple(tokenizer(row["prompt"])["input_ids"][:LONGEST]) for row in rows]
    return [ids for ids in encoded if len(ids) >= SHORTEST][:count]


def choose(popularity: str, tasks: int, count: int) -> list[int]:
    """The task of each request; always the same for the same arguments."""
    if popularity not in POPULARITIES or tasks < 1:
        raise ValueError(f"expected {', '.join(POPULARITIES)} over at least one task, got {popularity!r} over {tasks}")
    draw = random.Random(0)
    if popularity == "identical":
        return [0] * count
    if popularity == "zipf":
        return draw.choices(range(tasks), [(k + 1) ** -ZIPF for k in range(tasks)], k=count)
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += draw.sample(range(tasks), tasks)
    return chosen[:count]


def requests_of(load: Load, texts: Sequence[tuple[int, ...]]) -> list[Request]:
    """The requests of a load: prompts in order, from the first again when they run out."""
    chosen = choose(load.popularity, load.tasks, load.requests)
    return [Request(task, texts[i % len(texts)]) for i, task in enumerate(chosen)]


def by_task(requests: Sequence[Request], concurrency: int) -> Iterator[list[int]]:
    """Batches of a server that holds one task at a time, as places in `requests`.

    `concurrency` requests wait; the task of the oldest is next, and all that wait for it go together. As they end, as
    many new ones arrive.
    """
    waiting = list(range(min(concurrency, len(requests))))
    arrived = len(waiting)
    while waiting:
        task = requests[waiting[0]].task
        batch = [i for i in waiting if requests[i].task == task]
        yield batch
        left = [i for i in waiting if requests[i].task != task]
        arriving = min(len(batch), len(requests) - arrived)
        waiting = left + list(range(arrived, arrived + arriving))
        arrived += arriving


def numbers(outcomes: Sequence[Outcome], wall: float) -> dict[str, float]:
    """Columns of a row: throughput, latencies, and by Little's law how many requests were in service on average."""
    times = {"first": [1e3 * o.first_token for o in outcomes], "latency": [1e3 * o.end for o in outcomes]}
    return {
        "tokens_per_second": sum(len(o.tokens) for o in outcomes) / wall,
        **{f"{name}_p{q}_ms": percentile(ms, q / 100) for name, ms in times.items() for q in (50, 95)},
        "batch_mean": sum(o.end - o.taken_up for o in outcomes) / wall,
    }
