"""Small kernels beside a large one: a block of launches on a side stream, for plans with overlap.

Inputs need no care: the main stream waits at the join before anything of it can be freed and used again. Results are
allocated by the side stream, so the allocator is told at the join that the main stream uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def side_stream(like: Tensor, wanted: bool) -> Iterator[Callable[..., None]]:
    """Send the launches of the block to the side stream of `like`'s device, if wanted and possible.

    Yields:
        join: to be called with the block's results (tensors or None) before they are used; the current stream waits.
    """
    if not wanted or like.device.type != "cuda":
        yield lambda *results: None
        return
    stream = _stream_of(like.device)

    def join(*results: Tensor | None) -> None:
        current = torch.cuda.current_stream(like.device)
        current.wait_stream(stream)
        for result in results:
            if result is not None:
                result.record_stream(current)

    stream.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(stream):
        yield join
