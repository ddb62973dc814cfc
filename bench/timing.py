"""Honest timing of alternatives in one process: interleaved, in shuffled order, percentiles.

In:   named callables, verified to be right, and a clock that takes the time of one call.
Out:  p20, p50 and p80 of each, in seconds; or the error of one that failed while it was timed.
Who:  `bench.run`. The clock of a GPU is in `bench.cuda`; tests have one that only counts.

One run of each per round, so that a slow moment of the machine hits all alike; the order changes from round to round,
because what ran before leaves caches and memory behind for what comes next.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Percentiles of repeated runs, seconds."""

    p20: float
    p50: float
    p80: float


class Clock(Protocol):
    """What takes the time of one call."""

    def measure(self, run: Run) -> float:
        """Call `run` once; seconds."""


class WallClock:
    """Wall time on the CPU. Each call finds the heap in another state.

    The same product takes up to 1.7 times as long where its output lands badly, so ballast of random size lets it
    land anywhere; otherwise one provider is unlucky for a whole run and another is not.
    """

    def __init__(self) -> None:
        self._random = random.Random(0)

    def measure(self, run: Run) -> float:
        """Call `run` once; seconds."""
        ballast = [bytearray(self._random.randrange(1, 1 << 22)) for _ in range(3)]
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        del ballast
        return seconds


def interleaved(
    cases: Mapping[str, Run],
    *,
    repeats: int,
    warmup: int = 5,
    clock: Clock | None = None,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Timing | Exception]:
    """Time the cases in turn, one run of each per round, the order shuffled from round to round.

    Args:
        cases: callables by name.
        repeats: rounds that count, at least 1.
        warmup: rounds before them.
        clock: takes the time of one call; wall time by default.
        on_round: called with the number of each finished round.

    Returns:
        Percentiles by name. A case that raises is dropped from the rounds, and its exception stands in its place;
        `KeyboardInterrupt` is not caught.

    Raises:
        ValueError: repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    clock = clock or WallClock()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    failed: dict[str, Exception] = {}
    order, shuffler = list(cases.items()), random.Random(0)
    for turn in range(warmup + repeats):
        shuffler.shuffle(order)
        for name, run in order:
            if name in failed:
                continue
            try:
                taken = clock.measure(run)
            except Exception as error:
                failed[name] = error
                continue
            if turn >= warmup:
                seconds[name].append(taken)
        if on_round is not None:
            on_round(turn + 1)
    return {name: failed[name] if name in failed else percentiles(seconds[name]) for name in cases}


def percentiles(values: list[float]) -> Timing:
    """The measured values nearest to 20, 50 and 80 % of the way from smallest to largest."""
    ordered = sorted(values)

    def at(q: float) -> float:
        return ordered[round(q * (len(ordered) - 1))]

    return Timing(at(0.2), at(0.5), at(0.8))
