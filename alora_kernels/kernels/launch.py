"""The one door through which every Triton kernel is launched.

Tensors on the meta device have no data: running a launcher on them inside `recording(chip)` yields exactly the launches
a GPU of that kind would get. Ahead-of-time compilation (`bench static`) and tests that count launches read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # in the kernel's order
    meta: dict[str, Any]  # constexprs, num_warps and num_stages


class Recording(NamedTuple):
    """What a `recording` block has seen so far: the chip it pretends to be, and the launches."""

    chip: str
    launches: list[Launch]


_recording: ContextVar[Recording | None] = ContextVar("alora_kernels_recording", default=None)
_held: ContextVar[list[Launch] | None] = ContextVar("alora_kernels_held", default=None)


@contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Record launches on meta tensors as if the device were `chip` ("sm_90", "gfx942"); the list grows in the block."""
    token = _recording.set(Recording(chip, []))
    try:
        yield _recording.get().launches  # type: ignore[union-attr]
    finally:
        _recording.reset(token)


def recorded_chip() -> str | None:
    """The chip of the innermost `recording` block, or None outside of one."""
    current = _recording.get()
    return None if current is None else current.chip


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` over `grid` on the device of its tensors, or record it (meta tensors).

    A zero anywhere in the grid launches nothing. `args` are in the kernel's order (tensors, numbers, None), `meta` are
    the constexprs by name, `num_warps` and `num_stages`.
    """
    if 0 in grid:
        return
    if (held := _held.get()) is not None:
        after = {"launch_pdl": True} if held else {}
        held.append(Launch(kernel, grid, args, {**meta, "PDL": True, **after}))
        return
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    if tensor.is_meta:
        current = _recording.get()
        if current is not None:
            current.launches.append(Launch(kernel, grid, args, meta))
        return
    # Triton launches on the current device, which need not be the tensors' own.
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


@contextmanager
def overlapping() -> Iterator[None]:
    """Make the two launches of the block at its end, one right after the other; the second begins beside the first.

    Both kernels are given `PDL=True`: the first calls `sync.start_dependents`, the second `sync.wait_for_predecessor`
    before it reads what the first stores, or stores. Operators of torch in the block run before either, so none may
    need what they store. README.md says why no other launch can disturb them.
    """
    held: list[Launch] = []
    token = _held.set(held)
    try:
        yield
    finally:
        _held.reset(token)
    tensors = [arg for one in held for arg in one.args if isinstance(arg, Tensor)]
    if not tensors or not tensors[0].is_cuda:
        for one in held:
            launch(one.kernel, one.grid, *one.args, **one.meta)
        return
    with torch.cuda.device(tensors[0].device):
        # Bound and compiled beforehand: if Python were at work between the launches, the first would soon be over.
        for run, values in [_bound(one) for one in held]:
            run(*values)


def _bound(one: Launch) -> tuple[Any, list[Any]]:
    """What launches a compiled kernel, and all its arguments in order, constexprs among them."""
    compiled = one.kernel.warmup(*one.args, grid=one.grid, **one.meta)
    constants = [one.meta[name] for name in one.kernel.arg_names[len(one.args) :]]
    return compiled[(*one.grid, 1, 1)[:3]], [*one.args, *constants]
