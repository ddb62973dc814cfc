"""Several task-routed layers that read the same x, in Triton launches: one shrink, one da, one dx for all.

In:   x and the members: weight, bias, adapter and B of each.
Out:  the same two results as `torch_group`: `linear_group` and `linear_group_backward`.
Who:  `ops.group_library` calls these functions through its custom ops. Soft-routed groups are one op per member.

The members' A lie side by side along the rank. The first member's dx launch carries the low-rank part of all members;
the others' base products are added to its result by torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from .triton.layer import kernel_dropout
from .types import Grads, Member, Needs, Saved, acc_dtype


def _common_scaling(members: Sequence[Member]) -> float:
    """The members' s where all have the same, to be applied in the accumulator; else 1."""
    scalings = {m.adapter.scaling for m in members}
    return scalings.pop() if len(scalings) == 1 else 1.0


def _ranks(members: Sequence[Member]) -> list[int]:
    return [m.b.shape[1] for m in members]


def linear_group(x: Tensor, members: Sequence[Member]) -> tuple[list[Tensor], Saved]:
    """y_i = x w_i^T + bias_i + h_i b_i^T of every member; h is saved scaled, members side by side."""
    first, common = members[0], _common_scaling(members)
    a = torch.cat([m.adapter.a for m in members], dim=1)
    h = kernels.task_shrink(x, a, first.adapter.task_groups, scaling=common, dropout=kernel_dropout(first.adapter))
    parts = h.split(_ranks(members), 1)
    if any(m.adapter.scaling != common for m in members):
        for m, part in zip(members, parts, strict=True):
            part.mul_(m.adapter.scaling)
    ys = [kernels.linear_expand(x, m.w, m.bias, part, m.b) for m, part in zip(members, parts, strict=True)]
    return ys, Saved(h, x.new_empty(0, dtype=acc_dtype(x)))


def linear_group_backward(
    dys: Sequence[Tensor], x: Tensor, members: Sequence[Member], saved: Saved, needs: Sequence[Needs]
) -> tuple[Tensor | None, list[Grads], list[Tensor | None]]:
    """dx = sum_i dy_i w_i + the low-rank parts, in one tensor; the gradients of each member's A and B."""
    first, groups, dropout = members[0], members[0].adapter.task_groups, kernel_dropout(members[0].adapter)
    triples = zip(members, dys, saved.h.split(_ranks(members), 1), strict=True)
    dhs, dbs = zip(*(kernels.expand_backward(dy, m.b, h, scaling=m.adapter.scaling) for m, dy, h in triples))
    a, dh = torch.cat([m.adapter.a for m in members], dim=1), torch.cat(dhs, dim=1)
    dx = None
    if needs[0].x:
        dx = kernels.linear_dx_task(dys[0], first.w, dh, a, groups, dtype=x.dtype, dropout=dropout)
        for m, dy in zip(members[1:], dys[1:], strict=True):
            dx.addmm_(dy, m.w)
    das: Sequence[Tensor | None] = [None] * len(members)
    if any(need.a for need in needs):
        da = kernels.task_da(dh, x, groups, a.shape[0], dtype=a.dtype, dropout=dropout)
        # outputs of an op must not share memory
        das = [part.clone(memory_format=torch.contiguous_format) for part in da.split(_ranks(members), 1)]
    grads = [Grads(dx, da, None).cast_adapter(m.adapter) for m, da in zip(members, das, strict=True)]
    return dx, grads, [db if need.b else None for db, need in zip(dbs, needs, strict=True)]
