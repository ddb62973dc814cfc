"""Small kernels beside a large one: a side stream per device.

In:   a tensor of the device, and whether overlap is wanted.
Out:  a block whose launches go to the side stream, and a join after which the main stream may use their results.
Who:  `triton_backend`, for plans with overlap. Without CUDA, or without overlap, both do nothing.

Inputs need no care: the main stream waits at the join before anything of it can be freed and used again. Results are
allocated by the side stream, so the allocator is told at the join that the main stream uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """Work in flight on a side stream; `join` before its results are used."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    def join(self, *results: Tensor | None) -> None:
        """Let the current stream wait for the block, whose results these are."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for result in results:
            if result is not None:
                result.record_stream(current)


@contextmanager
def beside(like: Tensor, wanted: bool) -> Iterator[Beside]:
    """Send the launches of the block to the side stream of `like`'s device, if wanted and possible."""
    if not wanted or like.device.type != "cuda":
        yield Beside(None)
        return
    stream = _side_stream(like.device)
    stream.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(stream):
        yield Beside(stream)
