"""The layer in Triton launches: one or two forward, three to five backward; called as `torch_backend` is.

`kernels/README.md` derives what each launch reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from operator import is_not
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels import tuned
from ..kernels.tiles import shape_class
from ..records import acc_dtype
from .dispatch import ENV, PLANS, BackendError, Plan, explain_plan
from .types import Adapter, Grads, Needs, Saved

SAFEST = ("base_first", "low_rank_first", "two_launch", "one_pass")  # the first is right unless it was found wrong
ROWS_PER_TASK = 32  # with fewer, a leader's 128 rows meet many tasks, and each is another pass over them


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _nothing(*results: Tensor | None) -> None:
    """`join` where nobody has to wait."""


def side_stream(like: Tensor, wanted: bool) -> AbstractContextManager[Callable[..., None]]:
    """Send the launches of the block to the side stream of `like`'s device, if wanted and possible.

    Yields `join`, to be called with the block's results (tensors or None) before they are used. Inputs need no care:
    the main stream waits there before anything of it can be freed and used again. Results are allocated by the side
    stream, so the allocator is told that the main stream uses them.
    """
    return _beside(like) if wanted and like.device.type == "cuda" else nullcontext(_nothing)


@contextmanager
def _beside(like: Tensor) -> Iterator[Callable[..., None]]:
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


def plan_on(device: torch.device, routing: str, itemsize: int, m: int, k: int, n: int) -> tuple[Plan, str]:
    """The plan for a layer on a device, and why: the user's own measurement there, else what `explain_plan` says.

    What `alora tune` found wrong there is not taken, and one-pass kernels only where it found them right.
    """
    table, why = tuned.find(device)
    if table is not None and (own := table.plan(routing, itemsize, shape_class(m, k, n), k, n)):
        return Plan(*own), f"measured on this chip, {why}"
    plan, reason = explain_plan(kernels.chip_of(device), routing, itemsize, m, k, n)
    if table is None and plan.forward != "one_pass":
        return plan, reason
    verdicts = {} if table is None else table.verdicts
    unknown = "not proven, run `alora tune`" if plan.forward == "one_pass" and device.type != "meta" else tuned.OK
    verdict = verdicts.get(f"{routing}/{plan.forward}", unknown)
    if verdict == tuned.OK:
        return plan, reason
    for name in SAFEST:
        if verdicts.get(f"{routing}/{name}", "" if name != SAFEST[0] else tuned.OK) == tuned.OK:
            return PLANS[name], f"{plan.forward} here: {verdict}"
    raise BackendError(f"no plan is right on this chip, {plan.forward}: {verdict}. Set {ENV}=torch")


class Known(NamedTuple):
    """Plans that were asked for before, and the tables that they follow from."""

    tables: tuple[object, ...]
    plans: dict[tuple[object, ...], Plan]


_known: dict[torch.device, Known] = {}


def _plan_for(x: Tensor, w: Tensor, adapter: Adapter) -> Plan:
    """The plan that tables and rules choose, asked for once per layer and class of shapes while the tables stay."""
    routing, size, (m, k), n = "task" if adapter.router is None else "soft", x.element_size(), x.shape, w.shape[0]
    tables = (tuned.find(x.device), tuned.PLANS, len(tuned.PLANS))
    known = _known.get(x.device)
    if known is None or any(map(is_not, known.tables, tables)):
        known = _known[x.device] = Known(tables, {})
    key = (kernels.chip_of(x.device), routing, size, shape_class(m, k, n), k, n)
    if key not in known.plans:
        known.plans[key] = plan_on(x.device, routing, size, m, k, n)[0]
    return known.plans[key]


def shrink(x: Tensor, adapter: Adapter) -> Saved:
    """h = s sum_e gate_e A_e dropout(x), and p for soft routing; see `types.Saved`."""
    if adapter.router is None:
        h = kernels.shrink_task(x, adapter.a, adapter.task_groups, scaling=adapter.scaling, dropout=adapter.dropout)
        return Saved(h, x.new_empty(0, dtype=acc_dtype(x.dtype)))
    return Saved(*kernels.shrink_soft(x, adapter.a, adapter.router, scaling=adapter.scaling, dropout=adapter.dropout))


def _one_pass(
    x: Tensor, w: Tensor, bias: Tensor | None, adapter: Adapter, b: Tensor, forced: bool
) -> tuple[Tensor, Saved] | None:
    """The whole layer in one launch, or None where no one-pass kernel takes it; a BackendError if it was forced."""
    dropout, a, scaling = adapter.dropout, adapter.a, adapter.scaling
    if adapter.router is None:
        ids, empty = adapter.task_groups.ids, x.new_empty(0, dtype=acc_dtype(x.dtype))
        if dropout is None and kernels.takes_decode(x, a):
            y, h = kernels.decode(x, w, bias, a, b, ids, scaling=scaling)
            return y, Saved(h, empty)
        crowded = x.shape[0] < ROWS_PER_TASK * a.shape[0] and not forced
        if kernels.takes_one_pass_task(x, w, a, dropout) and not crowded:
            y, h = kernels.one_pass_task(x, w, bias, a, b, ids, scaling=scaling, dropout=dropout)
            return y, Saved(h, empty)
    elif kernels.takes_one_pass_soft(x, w, a):
        y, h, p = kernels.one_pass_soft(x, w, bias, a, b, adapter.router, scaling=scaling, dropout=dropout)
        return y, Saved(h, p)
    if forced:
        raise BackendError(
            f"the one-pass kernels do not take this layer (x {tuple(x.shape)} {x.dtype}, lora_A {tuple(a.shape)}):"
            " above 64 rows they need a chip with a tensor copy engine (Hopper or later), contiguous 16-byte aligned"
            " rows, rank <= 64 (32 in float32, or with dropout and task ids), 16-bit x (on GPUs) and, for soft routing,"
            ' E * R <= 128. Use backend="triton:two_launch"'
        )
    return None


def _overlaps(x: Tensor, forced: bool) -> bool:
    """Whether the GEMM may begin beside the shrink; a BackendError where that was forced and cannot be."""
    # s is applied by torch after a shrink in float64
    if kernels.overlaps_launches(x.device) and x.dtype != torch.float64:
        return True
    if forced:
        chip = kernels.chip_of(x.device)
        raise BackendError(
            f"plan two_launch+pdl needs an NVIDIA GPU from Hopper (sm_90) on and no float64 (this is {chip}, x is"
            f' {x.dtype}). Use backend="triton:two_launch"'
        )
    return False


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None, adapter: Adapter, b: Tensor, plan: Plan | None = None
) -> tuple[Tensor, Saved]:
    """y = x w^T + bias + h b^T, and what the backward needs."""
    chosen = plan or _plan_for(x, w, adapter)
    if chosen.forward == "one_pass":
        done = _one_pass(x, w, bias, adapter, b, forced=plan is not None)
        if done is not None:
            return done
    if chosen.forward == "base_first":
        with side_stream(x, chosen.overlap) as join:
            saved = shrink(x, adapter)
        y = F.linear(x, w, bias)
        join(*saved)
        return y.addmm_(saved.h, b.to(x.dtype).t()), saved
    if chosen.forward == "two_launch+pdl" and _overlaps(x, forced=plan is not None):
        with kernels.overlapping():
            saved = shrink(x, adapter)
            return kernels.expand(x, w, bias, saved.h, b), saved
    saved = shrink(x, adapter)
    if chosen.forward == "low_rank_first":
        return F.linear(saved.h, b.to(x.dtype), bias).addmm_(x, w.t()), saved
    return kernels.expand(x, w, bias, saved.h, b), saved


def _routed_dx(dp: Tensor, adapter: Adapter, dy: Tensor | None, w: Tensor | None, like: Tensor, fused: bool) -> Tensor:
    """dx = dy w + dp [a; router]; dp is dh under task routing. Without w the low-rank part alone."""
    dropout, base = adapter.dropout, (dy, w) if fused else (None, None)
    if adapter.router is None:
        groups = adapter.task_groups
        dx = kernels.dx_task(*base, dp, adapter.a, groups, dtype=like.dtype, dropout=dropout)
    else:
        dx = kernels.dx_soft(*base, dp, adapter.a, adapter.router, dtype=like.dtype, dropout=dropout)
    return dx if fused or dy is None or w is None else dx.addmm_(dy, w)


def _routed_backward(
    dh: Tensor, x: Tensor, adapter: Adapter, saved: Saved, needs: Needs, dy: Tensor | None, w: Tensor | None, plan: Plan
) -> Grads:
    """Gradients of x and the adapter from dh; da beside dx where the plan says so."""
    dx = da = drouter = None
    a, dropout = adapter.a, adapter.dropout
    dp = dh if adapter.router is None else kernels.gate_backward(dh, saved.p, a.shape[0], dtype=x.dtype)
    wants_da = needs.a or needs.router
    with side_stream(x, plan.overlap and wants_da and needs.x) as join:
        if wants_da and adapter.router is None:
            da = kernels.da_task(dp, x, adapter.task_groups, a.shape[0], dtype=a.dtype, dropout=dropout)
        elif wants_da:
            da, drouter = kernels.da_soft(dp, x, a.shape[0], dtype=a.dtype, dropout=dropout)
    if needs.x:
        dx = _routed_dx(dp, adapter, dy, w, x, plan.dx == "fused")
    join(da, drouter)
    return Grads(dx, da, drouter).cast_adapter(adapter)


def shrink_backward(dh: Tensor, x: Tensor, adapter: Adapter, saved: Saved, needs: Needs) -> Grads:
    """Gradients of `shrink` from the gradient of the UNSCALED h."""
    return _routed_backward(dh, x, adapter, saved, needs, None, None, PLANS["two_launch"])


def linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, adapter: Adapter, b: Tensor, saved: Saved, needs: Needs, plan: Plan | None = None
) -> tuple[Grads, Tensor | None]:
    """Gradients of `linear` for x, a, router and b; one pass over dy gives dh and db."""
    chosen = plan or _plan_for(x, w, adapter)
    dh, db = kernels.expand_backward(dy, b, saved.h, scaling=adapter.scaling)
    return _routed_backward(dh, x, adapter, saved, needs, dy, w, chosen), db if needs.b else None
