"""Counters for the one-pass kernels: int32 memory that is zero whenever no launch is using it.

In:   a device and how many counters one launch needs.
Out:  that many zeros. The kernel sets them back to zero (`flags.clean_up`), so they are handed out again.
Who:  the launchers of one-pass kernels.

Launches of one stream follow each other, so each stream has one block that all its launches share. A launch that is
being captured into a CUDA graph gets counters of its own, because the graph may be replayed on another stream: cut
from an arena that was zeroed before, or, when none is left, zeroed by a node of the graph.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

ARENA = 1 << 20  # counters per device for captured launches: 4 MiB, some thousand launches
LEAST = 4096  # counters of a stream's block: enough for M = 500,000 in blocks of 128 rows

_lock = Lock()
_blocks: dict[tuple[torch.device, int], Tensor] = {}
_arenas: dict[torch.device, Tensor] = {}  # what is left of each


def counters(device: torch.device, size: int) -> Tensor:
    """`size` int32 zeros that a kernel may use and must leave zero."""
    if device.type == "meta":
        return torch.empty(size, dtype=torch.int32, device=device)
    with _lock:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _captured(device, size)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if device.type == "cuda" and device not in _arenas:
            _arenas[device] = torch.zeros(ARENA, dtype=torch.int32, device=device)
        block = _blocks.get((device, stream))
        if block is None or block.numel() < size:
            block = torch.zeros(max(size, LEAST), dtype=torch.int32, device=device)
            _blocks[device, stream] = block
        return block[:size]


def _captured(device: torch.device, size: int) -> Tensor:
    arena = _arenas.get(device)
    aligned = -(-size // 4) * 4  # blocks begin at 16 bytes, as Triton assumes of fresh tensors
    if arena is None or arena.numel() < aligned:
        return torch.zeros(size, dtype=torch.int32, device=device)
    _arenas[device] = arena[aligned:]
    return arena[:size]
