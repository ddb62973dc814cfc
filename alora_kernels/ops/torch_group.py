"""Several layers that read the same x, in torch calls: one pass over x for all skinny products, one dx.

In:   x and the members: weight, bias, adapter and B of each.
Out:  every member's output; in the backward one dx and the gradients of every member.
Who:  `ops.group_library` calls these functions through its custom ops.

Under task routing the members' A lie side by side along the rank, `[E, R_1 + R_2 + .., K]`; under soft routing one
product makes every member's p, and each member has its own gate. Base products stay separate: concatenated frozen
weights would be a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .mixed import add_product_, product, turned_product, without_autocast
from .torch import soft as soft
from .torch.layer import base_product, drop, task_backward, task_shrink
from .types import Grads, Member, Needs, Saved, acc_dtype, wider

STACKED = 12  # largest number of rows of A, of all tasks and members, per row of x at which the A are stacked


def _stacks(members: Sequence[Member], x: Tensor) -> list[Sequence[Member]]:
    """The members in one stack, or one by one where copying their A costs more than it saves."""
    rows_of_a = sum(m.adapter.a.shape[0] * m.adapter.a.shape[1] for m in members)
    return [members] if rows_of_a <= STACKED * x.shape[0] else [[m] for m in members]


def _side_by_side(stack: Sequence[Member], x: Tensor) -> Tensor:
    """The A of a stack along the rank, `[E, sum R, K]`, in x's dtype."""
    parts = [m.adapter.a.to(x.dtype) for m in stack]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _widened(x: Tensor, members: Sequence[Member]) -> Tensor:
    """x in the dtype of the skinny products."""
    return x.to(wider(x, *(t for m in members for t in (m.adapter.a, m.adapter.router))))


def _ranks(members: Sequence[Member]) -> list[int]:
    return [m.b.shape[1] for m in members]


@without_autocast
def linear_group(x: Tensor, members: Sequence[Member]) -> tuple[list[Tensor], Saved]:
    """y_i = x w_i^T + bias_i + s_i h_i b_i^T of every member; what is saved is unscaled, members side by side."""
    adapters = [m.adapter for m in members]
    wide = _widened(x, members)
    dropped, _ = drop(wide, adapters[0].dropout)
    if adapters[0].router is None:
        groups = adapters[0].task_groups
        hs = [task_shrink(dropped, _side_by_side(stack, wide), groups, 1.0) for stack in _stacks(members, x)]
        h = hs[0] if len(hs) == 1 else torch.cat(hs, dim=1)
        p = x.new_empty(0, dtype=acc_dtype(x))
    else:
        p = soft.products(wide, dropped, adapters)
        h = torch.cat(soft.mixtures(p, adapters), dim=1).to(wide.dtype)
    ys = [
        add_product_(base_product(x, m.w, m.bias, m.adapter.groups), part, m.b.t(), m.adapter.scaling)
        for m, part in zip(members, h.split(_ranks(members), 1), strict=True)
    ]
    return ys, Saved(h, p)


@without_autocast
def linear_group_backward(
    dys: Sequence[Tensor], x: Tensor, members: Sequence[Member], saved: Saved, needs: Sequence[Needs]
) -> tuple[Tensor | None, list[Grads], list[Tensor | None]]:
    """dx = sum_i dy_i w_i + the low-rank parts, in one tensor; the gradients of each member's adapter and B."""
    triples = list(zip(members, dys, saved.h.split(_ranks(members), 1), strict=True))
    dbs = [
        turned_product(dy, h, m.adapter.scaling).to(m.b.dtype) if need.b else None
        for (m, dy, h), need in zip(triples, needs, strict=True)
    ]
    dx = None
    if needs[0].x:
        dx = dys[0] @ members[0].w
        for m, dy, _ in triples[1:]:
            dx.addmm_(dy, m.w)
    wanted = any(need.a or need.router for need in needs)
    if dx is None and not wanted:
        return None, [Grads(None, None, None)] * len(members), dbs
    wide = _widened(x, members)
    dhs = [product(dy, m.b, m.adapter.scaling).to(wide.dtype) for m, dy, _ in triples]
    grads = _routed_backward(dx, dhs, wide, members, saved, wanted)
    return dx, [found.cast_adapter(m.adapter) for found, m in zip(grads, members, strict=True)], dbs


def _routed_backward(
    dx: Tensor | None, dhs: Sequence[Tensor], x: Tensor, members: Sequence[Member], saved: Saved, wanted: bool
) -> Sequence[Grads]:
    """Add the low-rank parts to dx in place; gradients of each a and router, if wanted."""
    adapters = [m.adapter for m in members]
    dropped, mask = drop(x, adapters[0].dropout)
    if adapters[0].router is not None:
        return soft.backward(dx, dhs, x, saved.p, adapters, dropped, mask, wanted)
    found: list[Grads] = []
    for stack in _stacks(members, x):
        dh = torch.cat(list(dhs[len(found) : len(found) + len(stack)]), dim=1)
        da = task_backward(dx, dh, _side_by_side(stack, x), adapters[0].task_groups, dropped, mask, wanted)
        # outputs of an op must not share memory
        parts = [None] * len(stack) if da is None else [da] if len(stack) == 1 else _copies(da, stack)
        found += [Grads(dx, part, None) for part in parts]
    return found


def _copies(da: Tensor, stack: Sequence[Member]) -> list[Tensor]:
    return [part.clone(memory_format=torch.contiguous_format) for part in da.split(_ranks(stack), 1)]
