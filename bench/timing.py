"""Honest timing of alternatives in one process: interleaved, in shuffled order, percentiles.

One run of each per round, so that a slow moment of the machine hits all alike; the order changes from round to round,
because what ran before leaves caches and memory behind for what comes next. GPUs find a cold cache.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from alora_kernels.text import percentile
from alora_kernels.tuning.gpu import CudaClock as CudaClock
from alora_kernels.tuning.gpu import Run
from alora_kernels.tuning.gpu import capture as capture

Clock = Callable[[Run], float]  # calls once; seconds


@dataclass(frozen=True)
class Timing:
    """Percentiles of repeated runs, seconds."""

    p20: float
    p50: float
    p80: float


class WallClock:
    """Wall time on the CPU. Each call finds the heap in another state.

    The same product takes up to 1.7 times as long where its output lands badly, so ballast of random size lets it
    land anywhere; otherwise one provider is unlucky for a whole run and another is not.
    """

    def __init__(self) -> None:
        self._random = random.Random(0)

    def __call__(self, run: Run) -> float:
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
    on_round: Callable[[int], None] = lambda turn: None,
) -> dict[str, Timing | Exception]:
    """Time the cases, by name, in turn: one run of each per round, the order shuffled from round to round.

    A case that raises is dropped from the rounds, and its exception stands in place of its percentiles;
    `KeyboardInterrupt` is not caught. `on_round` gets the number of each finished round, warmup included.
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
                taken = clock(run)
            except Exception as error:
                failed[name] = error
                continue
            if turn >= warmup:
                seconds[name].append(taken)
        on_round(turn + 1)
    return {name: failed[name] if name in failed else percentiles(seconds[name]) for name in cases}


def percentiles(values: list[float]) -> Timing:
    """The measured values nearest to 20, 50 and 80 % of the way from smallest to largest."""
    return Timing(percentile(values, 0.2), percentile(values, 0.5), percentile(values, 0.8))


def peak_mb(step: Run, device: str) -> float | None:
    """MB that one eager call needs at its peak, above what was allocated before it; None on CPUs, not counted."""
    if device == "cpu":
        return None
    step()  # what is kept from the first call on, such as compiled kernels' workspaces, is not counted
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def release() -> None:
    """Give back what is no longer used, so that the next provider does not run out of memory for this one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
