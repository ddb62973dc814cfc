"""Honest timing of alternatives in one process: interleaved, percentiles, verified first.

In:   named callables that compute the same thing.
Out:  p20, p50 and p80 of each, in seconds.
Who:  `bench.cpu` and the later benchmarks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Percentiles of repeated runs, seconds."""

    p20: float
    p50: float
    p80: float


def interleaved(cases: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 5) -> dict[str, Timing]:
    """Time the cases in turn, one run of each per round, so that a slow moment of the machine hits all alike.

    The order changes from round to round: what ran before leaves caches and memory behind for what comes next.

    Args:
        cases: callables by name.
        repeats: rounds that count.
        warmup: rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order, shuffler = list(cases.items()), random.Random(0)
    for turn in range(warmup + repeats):
        shuffler.shuffle(order)
        for name, case in order:
            # the same product takes up to 1.7 times as long where its output lands badly, so let it land anywhere
            ballast = [bytearray(shuffler.randrange(1, 1 << 22)) for _ in range(3)]
            start = time.perf_counter()
            case()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
            del ballast
    return {name: _percentiles(sorted(values)) for name, values in seconds.items()}


def _percentiles(ordered: list[float]) -> Timing:
    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    return Timing(at(0.2), at(0.5), at(0.8))
