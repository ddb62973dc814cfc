"""The one door through which every Triton kernel is launched.

In:   a jit kernel, its grid, the run-time arguments in order, the constexprs and warps/stages by name.
Out:  the kernel ran on the tensors' device; or, on `device="meta"`, it was only written down.
Who:  every launcher of this package; `bench.static.command` and launch-counting tests read the recordings.

A grid of zero programs is skipped here, so no launcher needs to special-case an empty batch. Tensors on
the meta device have shapes and strides but no data: running a launcher on them inside `recording(chip)`
yields exactly the launches a GPU of that kind would get, which ahead-of-time compilation then compiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One recorded launch.

    Attributes:
        kernel: the jit function.
        grid: number of programs along each axis.
        args: run-time arguments in the kernel's order.
        meta: constexprs, `num_warps` and `num_stages`.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


class Recording(NamedTuple):
    """What a `recording` block has seen so far: the chip it pretends to be, and the launches."""

    chip: str
    launches: list[Launch]


_recording: ContextVar[Recording | None] = ContextVar("alora_kernels_recording", default=None)


@contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Record what launchers would launch for meta tensors, as if the device were `chip`.

    Args:
        chip: a chip name as `tiles.chip_of` gives it, e.g. `"sm_90"` or `"gfx942"`.

    Yields:
        The launches, in order; the list grows while the block runs.

    Example:
        >>> with recording("sm_90") as launches:
        ...     expand(x.to("meta"), w.to("meta"), None, h.to("meta"), b.to("meta"))
    """
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

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis; a zero anywhere launches nothing.
        args: run-time arguments in the kernel's order (tensors, numbers, None).
        meta: constexprs by name, and `num_warps`, `num_stages`.
    """
    if math.prod(grid) == 0:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "meta":
        current = _recording.get()
        if current is not None:
            current.launches.append(Launch(kernel, grid, args, meta))
        return
    # Triton launches on the current device, which need not be the tensors' own.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **meta)
