"""The layer in torch calls: the backend of CPUs and of every device Triton does not serve.

B is hoisted out of the sum over experts, so base product and expand are ordinary products, and the low-rank part is
accumulated in place. Skinny products of 16-bit x and float32 adapters are float32 (`products`). Task routing picks rows
as `torch_rows` says. Under soft routing the gate replaces the logits in p: the backward needs no softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..records import Dropout, acc_dtype
from ..routing import RowGroups
from . import packed
from .dispatch import Plan
from .products import add_product_, product, transposed_product, without_autocast
from .torch_rows import Layout, Rows, Slots, Whole, layout_of
from .types import Adapter, Grads, Needs, Saved, wider


def dropout_mask(x: Tensor, dropout: Dropout) -> Tensor:
    """The scaled keep mask of x, the same for the same seed.

    16 random bits decide an entry, so p is rounded to 1/65536 and the scale is that of the rounded p. `bernoulli_`
    takes 2.6 times as long, and the mask is drawn twice, in forward and in backward.
    """
    dropped = round(dropout.p * 65536)
    if dropped == 65536:
        return torch.zeros_like(x)
    generator = torch.Generator(x.device).manual_seed(int(dropout.seed.item()))
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    return (bits >= dropped - 32768).view(x.shape).to(x.dtype).mul_(65536 / (65536 - dropped))


def _add(out: Tensor, rows: Rows, part: Tensor) -> None:
    """out[rows] += part, in place; rounded once where part is the wider one."""
    if isinstance(rows, slice) or out.dtype != part.dtype:
        out[rows] += part
    else:
        out.index_add_(0, rows, part)


def drop(x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
    """What the low-rank path sees of x, and the mask; x itself without dropout, else as wide as the adapter."""
    if adapter.dropout is None:
        return x, None
    x = x.to(wider(x, adapter.a, adapter.router))
    mask = dropout_mask(x, adapter.dropout)
    return x * mask, mask


def shrink_rows(x: Tensor, a: Tensor, layout: Layout, scaling: float) -> Tensor:
    """h_m = s A_{t(m)} x_m, and zero where row m has no task."""
    if isinstance(layout, Whole):
        return product(x, a[layout.task].t(), scaling)
    if isinstance(layout, Slots):
        # [T, C, K] [T, K, R]
        left, right = layout.lay(x), layout.matrices(a).transpose(1, 2)
        slots = torch.baddbmm(a.new_empty(()), left.to(a.dtype), right, beta=0, alpha=scaling)
        if layout.back is not None:
            return slots.flatten(0, 1).index_select(0, layout.back)
        return a.new_zeros(x.shape[0], a.shape[1]).index_copy_(0, layout.rows, layout.collect(slots))
    h = a.new_zeros(x.shape[0], a.shape[1])
    for task, rows in layout:
        h[rows] = product(x[rows], a[task].t(), scaling)
    return h


def _factors(adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a as `[E*R, K]` and the router."""
    assert adapter.router is not None
    return adapter.a.flatten(0, 1).to(dtype), adapter.router.to(dtype)


def _parts(p: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """The skinny products `[M, E, R]` and the gate (at first the logits) `[M, E]` inside p, as views."""
    experts, rank, _ = adapter.a.shape
    return p[:, : experts * rank].unflatten(1, (experts, rank)), p[:, experts * rank :]


def _soft_products(x: Tensor, dropped: Tensor, adapter: Adapter) -> Tensor:
    """p with the gate in the place of the logits, in `acc_dtype`; one product with x unless there is dropout."""
    a, router = _factors(adapter, wider(x, adapter.a, adapter.router))
    if dropped is x:
        p = product(x, torch.cat((a, router)).t(), 1.0)
    else:
        p = torch.cat((product(dropped, a.t(), 1.0), product(x, router.t(), 1.0)), dim=1)
    p = p.to(acc_dtype(x.dtype))
    _, gate = _parts(p, adapter)
    gate.copy_(torch.softmax(gate.t().contiguous(), dim=0).t())  # experts first: four times faster on CPUs
    return p


@without_autocast
def shrink(x: Tensor, adapter: Adapter) -> Saved:
    """h = s sum_e gate_e A_e dropout(x), and p for soft routing; see `types.Saved`."""
    dropped, _ = drop(x, adapter)
    dtype = wider(x, adapter.a, adapter.router)
    if adapter.router is None:
        layout = layout_of(adapter.task_groups, x.shape[1], dtype)
        h = shrink_rows(dropped, adapter.a.to(dtype), layout, adapter.scaling)
        return Saved(h, x.new_empty(0, dtype=acc_dtype(x.dtype)))
    p = _soft_products(x, dropped, adapter)
    low, gate = _parts(p, adapter)
    # [M, 1, E] [M, E, R]
    h = torch.bmm((gate * adapter.scaling).unsqueeze(1), low).squeeze(1)
    return Saved(h.to(dtype), p)


def base_product(x: Tensor, w: Tensor, bias: Tensor | None, groups: RowGroups | None) -> Tensor:
    """x w^T + bias.

    A packed weight rounds otherwise than `F.linear`, so it is not taken where base-only rows are to equal the base bit
    for bit.
    """
    if groups is not None and groups.offsets[0].item() > 0:
        return F.linear(x, w, bias)
    return packed.linear(x, w, bias)


@without_autocast
def linear(
    x: Tensor, w: Tensor, bias: Tensor | None, adapter: Adapter, b: Tensor, _: Plan | None = None
) -> tuple[Tensor, Saved]:
    """y = x w^T + bias + h b^T, accumulated in place, and what the backward needs; torch has no plans."""
    saved = shrink(x, adapter)
    y = base_product(x, w, bias, adapter.groups)
    return add_product_(y, saved.h, b.t()), saved


def task_backward(
    dx: Tensor | None, dh: Tensor, a: Tensor, groups: RowGroups, dropped: Tensor, mask: Tensor | None, wanted: bool
) -> Tensor | None:
    """Add the low-rank part to dx in place; the gradient of each task's a, zero where a task has no rows, if wanted."""
    layout = layout_of(groups, a.shape[2], dh.dtype)
    if isinstance(layout, Slots):
        return _slots_backward(dx, dh, a, layout, dropped, mask, wanted)
    if isinstance(layout, Whole):
        layout = [(layout.task, slice(None))]
    da = torch.zeros_like(a, dtype=acc_dtype(dh.dtype)) if wanted else None
    for task, rows in layout:
        dh_rows = dh[rows]
        if dx is not None and mask is None and isinstance(rows, slice):
            add_product_(dx[rows], dh_rows, a[task])
        elif dx is not None:
            part = dh_rows @ a[task]
            _add(dx, rows, part if mask is None else part * mask[rows])
        if da is not None and da.dtype == dh.dtype == dropped.dtype:
            da[task].addmm_(dh_rows.t(), dropped[rows])
        elif da is not None:  # runs of 16-bit rows are summed in float32
            da[task] += transposed_product(dh_rows, dropped[rows])
    return da


def _slots_backward(
    dx: Tensor | None, dh: Tensor, a: Tensor, layout: Slots, dropped: Tensor, mask: Tensor | None, wanted: bool
) -> Tensor | None:
    """The same with one product for the rows of all tasks and one for all da."""
    dh_slots = layout.lay_once(dh)
    if dx is not None:
        # [T, C, R] [T, R, K]
        part = layout.collect(torch.bmm(dh_slots, layout.matrices(a)))
        _add(dx, layout.rows, part if mask is None else part * mask[layout.rows])
    if not wanted:
        return None
    # [T, R, C] [T, C, K]
    da = torch.bmm(dh_slots.transpose(1, 2), layout.lay(dropped).to(dh.dtype))
    return da if layout.tasks is None else torch.zeros_like(a).index_copy_(0, layout.tasks, da)


def _gate_backward(dh: Tensor, p: Tensor, adapter: Adapter) -> Tensor:
    """dp = [gate_e dh | dlogits]."""
    dp = torch.empty_like(p)
    low, gate = _parts(p, adapter)
    dlow, dlogits = _parts(dp, adapter)
    # [M, E, R] [M, R, 1]
    dgate = torch.bmm(low, dh.unsqueeze(2)).squeeze(2)
    torch.mul(gate.unsqueeze(2), dh.unsqueeze(1), out=dlow)
    torch.mul(gate, dgate - (gate * dgate).sum(1, keepdim=True), out=dlogits)
    return dp


def _soft_backward(
    dx: Tensor | None, dh: Tensor, x: Tensor, p: Tensor, adapter: Adapter, dropped: Tensor, mask: Tensor | None,
    wanted: bool,
) -> Grads:  # fmt: skip
    """Add the low-rank part to dx in place; the gradients of a and router, if wanted."""
    dp = _gate_backward(dh.to(p.dtype), p, adapter).to(dh.dtype)
    a, router = _factors(adapter, dh.dtype)
    low, logits = dp.split([a.shape[0], router.shape[0]], 1)
    if dx is not None and mask is None:
        add_product_(dx, dp, torch.cat((a, router)))
    elif dx is not None and mask is not None:  # which the router does not see
        dx.add_((low @ a).mul_(mask).addmm_(logits, router))
    if not wanted:
        return Grads(dx, None, None)
    if mask is not None:
        return Grads(dx, (low.t() @ dropped).view_as(adapter.a), transposed_product(logits, x))
    da, drouter = transposed_product(dp, x).split([a.shape[0], router.shape[0]])
    return Grads(dx, da.view_as(adapter.a), drouter.clone())  # outputs of an op must not share memory


@without_autocast
def shrink_backward(
    dh: Tensor, x: Tensor, adapter: Adapter, saved: Saved, needs: Needs, dx: Tensor | None = None
) -> Grads:
    """Gradients of `shrink` from the gradient of the UNSCALED h; the low-rank part of dx is added to dx in place."""
    if dx is None and needs.x:
        dx = torch.zeros_like(x)
    dh = dh.to(wider(x, adapter.a, adapter.router))
    dropped, mask = drop(x, adapter)
    if adapter.router is None:
        da = task_backward(dx, dh, adapter.a.to(dh.dtype), adapter.task_groups, dropped, mask, needs.a)
        grads = Grads(dx, da, None)
    else:
        grads = _soft_backward(dx, dh, x, saved.p, adapter, dropped, mask, needs.a or needs.router)
    return grads.cast_adapter(adapter)


@without_autocast
def linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, adapter: Adapter, b: Tensor, saved: Saved, needs: Needs, _: Plan | None = None
) -> tuple[Grads, Tensor | None]:
    """Gradients of `linear` for x, a, router and b: dx = dy w + dp [a; router], db = dy^T h."""
    db = transposed_product(dy, saved.h).to(b.dtype) if needs.b else None
    dx = packed.matmul(dy, w) if needs.x else None
    if not (needs.x or needs.a or needs.router):
        return Grads(None, None, None), db
    dh = product(dy, b, adapter.scaling)
    return shrink_backward(dh, x, adapter, saved, needs, dx), db
