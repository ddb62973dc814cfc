"""The GPU as `tuning.run` uses it, and as the benchmarks do: a clock with a cold cache, CUDA graphs."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..ops.dispatch import prepare
from ..text import percentile

Run = Callable[[], object]
Name = TypeVar("Name")
WARM = 3  # runs before a capture or a measurement, which compile kernels and fill the allocator
ROUNDS = 40
NEAR = 2e-2  # two ways to take a sum differ by rounding; a lost or stale h is off by far more


class CudaClock:
    """Time between two events on the current stream, with a cold L2 cache.

    Before every run a buffer of twice the L2 cache is written, so that no run finds its weights there because the one
    before it used the same. The host is waited for before each run and may launch ahead while the buffer is written.
    """

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * l2 // 4 + 1, dtype=torch.int32, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Run) -> float:
        """Seconds of one call."""
        torch.cuda.synchronize()
        self._flush.zero_()
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def capture(step: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """A CUDA graph of one call; calling the result replays it and returns the tensors it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return outputs

    return replay


class Gpu:
    """The current CUDA or ROCm device; tests bring their own."""

    dtype = torch.bfloat16
    now = staticmethod(time.monotonic)
    release = staticmethod(torch.cuda.empty_cache)

    def __init__(self, place: torch.device) -> None:
        prepare(place)
        facts = torch.cuda.get_device_properties(place)
        self.place, self._clock = place, CudaClock()
        #: bytes of shared memory that one program may have
        self.room = getattr(facts, "shared_memory_per_block_optin", 0) or facts.shared_memory_per_block

    def ready(self, step: Callable[[], Sequence[Tensor]]) -> Run:
        """What is timed in place of a step: a CUDA graph of it, which gives the same."""
        eager = [t.clone() for t in step()]
        replay = capture(step)
        if not all(torch.allclose(one, other, NEAR, NEAR) for one, other in zip(replay(), eager, strict=True)):
            raise RuntimeError("its CUDA graph gives other numbers")
        return replay

    def seconds(self, runs: Mapping[Name, Run]) -> dict[Name, float]:
        """The median of each, one run of all per round in shuffled order; the first rounds only warm up."""
        order, shuffler = list(runs), random.Random(0)
        taken: dict[Name, list[float]] = {name: [] for name in runs}
        for _ in range(WARM + ROUNDS):
            shuffler.shuffle(order)
            for name in order:
                taken[name].append(self._clock(runs[name]))
        return {name: percentile(found[WARM:], 0.5) for name, found in taken.items()}

    def alive(self) -> None:
        """Raise where the device answers no more: after some errors nothing runs in this process."""
        torch.ones(1, device=self.place).item()

    def hung(self, name: str) -> None:
        """A kernel that never ends cannot be interrupted: the process ends, and the table on disk names what ran."""
        print(f"error: {name} never ends. Run it again to go on without it", file=sys.stderr, flush=True)
        os._exit(1)
