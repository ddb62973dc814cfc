"""What timing needs on a GPU: events around a cold L2 cache, CUDA graphs, peak memory.

In:   a callable that launches work on the current stream.
Out:  a clock for `bench.timing`, a captured replay of the callable, the bytes it needs at its peak.
Who:  `bench.gpu` and `bench.layers.work`. Importing this file needs no GPU; calling it does.

Before every run a buffer of twice the L2 cache is written, so that no run finds its weights there because the one
before it used the same. The host is waited for before each run and may launch ahead while the buffer is written.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .timing import Run

CAPTURE_WARMUP = 3  # runs before a capture: they compile kernels and fill the allocator


class CudaClock:
    """Time between two events on the current stream, with a cold L2 cache."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * l2 // 4 + 1, dtype=torch.int32, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(self, run: Run) -> float:
        """Call `run` once; seconds that the GPU took."""
        torch.cuda.synchronize()
        self._flush.zero_()
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def capture(step: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """A CUDA graph of one call; calling the result replays it and returns the tensors it writes.

    Raises:
        RuntimeError: the call does something that a graph cannot hold, such as waiting for the GPU.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARMUP):
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
