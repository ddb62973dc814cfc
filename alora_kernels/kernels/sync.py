"""Order inside one launch: tickets hand out the work, flags say what is ready, the last program cleans up.

Tiles of the one-pass kernels wait for an h that other programs of the same launch compute. They share a block of int32
counters, [tickets taken, programs done, flag 0, flag 1, ...], that are zero when the launch begins (`counters` hands it
to the launcher) and zero again when it ends, so a CUDA graph can replay it.

Why no program can wait forever: work is numbered, whoever computes h has a smaller number than whoever waits for
it, and a program takes the next number only when it runs. So all work with smaller numbers is finished or running,
and the programs that compute h wait for nobody. This holds for any grid, co-resident or not.

Launches of one stream follow each other, so each stream has one block that all its launches share. A launch that is
being captured into a CUDA graph gets counters of its own, because the graph may be replayed on another stream. All are
cut from an arena that `prepare` makes when a model is adapted or first called: later calls may run inside a graph's
private memory, while it warms up as well as while it is captured, and nothing that outlives a launch may lie there.
Without an arena, or beyond its end, a launch gets zeros of its own.

Two launches overlap (`launch.overlapping`) without counters: the hardware knows when the first one is finished.
"""

from __future__ import annotations

import os
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.routing import capturing

from .tiles import chip_of, is_amd

HEADER = 2  # counters before the first flag
TICKETS, DONE = tl.constexpr(0), tl.constexpr(1)
FLAGS = tl.constexpr(HEADER)
# Builds for tests end a wait after so many looks at its flag: a test turns red where a device would hang.
TURNS = tl.constexpr(int(os.environ.get("ALORA_WAIT_TURNS", "0")))
GAVE_UP = tl.constexpr(1 << 30)
ARENA = 1 << 20  # counters per device: 4 MiB, some thousand captured launches
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # there one launch follows the other
LEAST = 4096  # counters of a stream: enough for M = 500,000 in blocks of 128 rows

_lock = Lock()
_blocks: dict[tuple[torch.device, int], Tensor] = {}
_arenas: dict[torch.device, Tensor] = {}  # what is left of each


@triton.jit
def take_ticket(counters_ptr):
    """The next number of work, unique within the launch."""
    return tl.atomic_add(counters_ptr + TICKETS, 1, sem="relaxed")


@triton.jit
def publish(counters_ptr, flag):
    """Raise a flag by one; what this program stored before is visible to whoever sees it raised."""
    tl.debug_barrier()  # the stores of all warps come before the one thread that raises the flag
    tl.atomic_add(counters_ptr + FLAGS + flag, 1, sem="release")


@triton.jit
def wait_for(counters_ptr, flag, count):
    """Return when the flag was raised `count` times.

    A wait that gives up spoils DONE: nobody cleans up, so this launch is found out and later ones find no work.
    """
    seen = tl.atomic_add(counters_ptr + FLAGS + flag, 0, sem="acquire")
    if TURNS == 0:
        while seen < count:
            seen = tl.atomic_add(counters_ptr + FLAGS + flag, 0, sem="acquire")
    else:
        turn = 0
        while (seen < count) & (turn < TURNS):
            seen = tl.atomic_add(counters_ptr + FLAGS + flag, 0, sem="acquire")
            turn += 1
        if seen < count:
            tl.atomic_max(counters_ptr + DONE, GAVE_UP, sem="relaxed")


@triton.jit
def clean_up(counters_ptr, num_flags, BLOCK: tl.constexpr):
    """Every program calls this last; the last one of all sets the counters back to zero."""
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + DONE, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        offs = tl.arange(0, BLOCK)
        while tl.min(offs, axis=0) < FLAGS + num_flags:
            tl.store(counters_ptr + offs, 0, mask=offs < FLAGS + num_flags)
            offs += BLOCK


@triton.jit
def start_dependents():
    """Let the next launch begin as soon as every program of this one has come here, or has ended."""
    if not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_predecessor():
    """Return when the launch before this one is finished and what it stored can be read; every program calls it."""
    if not INTERPRETED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def ahead_of(ticket, AHEAD, REST):
    """What a ticket stands for when each group of row blocks has AHEAD pieces that others wait for, and REST others.

    Gives the group, the piece's index in its part, and whether it is one of the AHEAD pieces. The pieces of group g + 1
    come before the rest of group g, so that nobody waits for a piece that runs beside it.
    """
    turn = ticket - AHEAD
    width = AHEAD + REST
    inside = turn % width
    first = ticket < AHEAD
    is_ahead = first | (inside < AHEAD)
    group = tl.where(first, 0, turn // width + (inside < AHEAD).to(tl.int32))
    index = tl.where(first, ticket, tl.where(inside < AHEAD, inside, inside - AHEAD))
    return group, index, is_ahead


def tickets_of(groups: int, ahead: int, rest: int) -> int:
    """How many tickets `ahead_of` numbers; the AHEAD pieces after the last group are empty."""
    return ahead + groups * (ahead + rest)


def orders_stores(device: torch.device) -> bool:
    """Whether a raised flag tells of the stores of a whole program: on AMD's chips nobody has measured it.

    There a release waits for the stores of its own wave, and the barrier before it for no stores at all.
    """
    return not is_amd(chip_of(device))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def prepare(device: torch.device) -> None:
    """Make the arena of a device, unless there is one or a graph is being captured."""
    if device in _arenas or capturing(device):
        return
    with _lock:
        _arenas.setdefault(device, torch.zeros(ARENA, dtype=torch.int32, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams will find it zero


def counters(device: torch.device, size: int) -> Tensor:
    """`size` int32 zeros that a kernel may use and must leave zero (`clean_up`)."""
    if device.type == "meta":
        return torch.empty(size, dtype=torch.int32, device=device)
    if device.type == "cpu":
        prepare(device)
    shared, key = not capturing(device), (device, _stream(device))
    with _lock:
        block = _blocks.get(key) if shared else None
        if block is None or block.numel() < size:
            block = _cut(device, max(size, LEAST) if shared else size)
            if block is None:
                return torch.zeros(size, dtype=torch.int32, device=device)
            if shared:
                _blocks[key] = block
        return block[:size]


def _cut(device: torch.device, size: int) -> Tensor | None:
    """The next `size` counters of the arena, if it has as many; each begins at 16 bytes, as Triton assumes."""
    arena, aligned = _arenas.get(device), -(-size // 4) * 4
    if arena is None or arena.numel() < aligned:
        return None
    _arenas[device] = arena[aligned:]
    return arena[:size]
