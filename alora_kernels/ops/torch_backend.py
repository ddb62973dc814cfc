"""The layer in torch calls: the backend of CPUs and of every device Triton does not serve.

In:   two-dimensional activations, the adapter, and rows grouped by task (or a router).
Out:  the same four results as `triton_backend`: `linear`, `shrink` and their backwards.
Who:  `ops.library` calls these functions through its custom ops.

B is hoisted out of the sum over experts, so the base product and the expand are ordinary matrix products
whatever the routing; the low-rank part is accumulated into their result in place. Task routing runs one
product per run of rows with the same task, or per task where ids are shuffled; nothing loops over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import RowGroups
from .types import Adapter, Dropout, Grads, Needs, Saved, acc_dtype

Rows = slice | Tensor
SHORTEST_RUN = 16  # mean rows per run from which a product per run is cheaper than gathering each task's rows


def dropout_mask(x: Tensor, dropout: Dropout) -> Tensor:
    """The scaled keep mask of x, the same for the same seed: 0 or 1 / (1 - p) in each entry."""
    if dropout.p == 1.0:
        return torch.zeros_like(x)
    generator = torch.Generator(x.device).manual_seed(int(dropout.seed.item()))
    return torch.empty_like(x).bernoulli_(1.0 - dropout.p, generator=generator).div_(1.0 - dropout.p)


def rows_of_tasks(groups: RowGroups) -> Iterator[tuple[int, Rows]]:
    """Each task that has rows, with its rows: slices where its rows lie in runs, their numbers where they do not.

    A batch of sequences has a run per sequence, and a task may come several times; shuffled tokens are gathered,
    once per task. Base-only rows never come.
    """
    tasks, lengths = torch.unique_consecutive(groups.ids, return_counts=True)
    if tasks.numel() * SHORTEST_RUN <= groups.ids.numel():
        start = 0
        for task, length in zip(tasks.tolist(), lengths.tolist(), strict=True):
            if task >= 0:
                yield task, slice(start, start + length)
            start += length
        return
    for task, (start, stop) in enumerate(pairwise(groups.offsets.tolist())):
        if start < stop:
            yield task, groups.order[start:stop]


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left right, rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def _accumulate(out: Tensor, rows: Rows, left: Tensor, right: Tensor, scaling: float = 1.0) -> None:
    """out[rows] += scaling * left right, in place."""
    if isinstance(rows, slice):
        out[rows].addmm_(left, right, alpha=scaling)
    else:
        out.index_add_(0, rows, _product(left, right, scaling))


def _experts(p: Tensor, adapter: Adapter) -> Tensor:
    """The skinny products `[M, E, R]` inside p, a view."""
    experts, rank, _ = adapter.a.shape
    return p[:, : experts * rank].unflatten(1, (experts, rank))


def _stacked(adapter: Adapter, x: Tensor) -> Tensor:
    """[a; router], `[E*R + E, K]` in x's dtype: what one product with x turns into p."""
    assert adapter.router is not None
    return torch.cat([adapter.a.flatten(0, 1), adapter.router]).to(x.dtype)


def _gate(p: Tensor, adapter: Adapter) -> Tensor:
    """The gate `[M, E]` inside p, a view: this backend keeps it in the place of the logits."""
    return p[:, -adapter.a.shape[0] :]


def shrink(x: Tensor, adapter: Adapter) -> Saved:
    """h = s sum_e gate_e A_e dropout(x), and p for soft routing; see `types.Saved`."""
    a, rank = adapter.a.to(x.dtype), adapter.a.shape[1]
    dropped = x if adapter.dropout is None else x * dropout_mask(x, adapter.dropout)
    if adapter.router is None:
        h = x.new_zeros(x.shape[0], rank)
        for task, rows in rows_of_tasks(adapter.task_groups):
            _accumulate(h, rows, dropped[rows], a[task].t(), adapter.scaling)
        return Saved(h, x.new_empty(0, dtype=acc_dtype(x)))
    if adapter.dropout is None:
        products = x @ _stacked(adapter, x).t()
    else:
        products = torch.cat([dropped @ a.flatten(0, 1).t(), x @ adapter.router.to(x.dtype).t()], dim=1)
    p = products.to(acc_dtype(x))
    gate = _gate(p, adapter)
    gate.copy_(torch.softmax(gate.t().contiguous(), dim=0).t())  # experts first: four times faster on CPUs
    # [M, 1, E] [M, E, R]
    h = torch.bmm((gate * adapter.scaling).unsqueeze(1), _experts(p, adapter))
    return Saved(h.squeeze(1).to(x.dtype), p)


def linear(x: Tensor, w: Tensor, bias: Tensor | None, adapter: Adapter, b: Tensor) -> tuple[Tensor, Saved]:
    """y = x w^T + bias + h b^T, accumulated in place, and what the backward needs."""
    saved = shrink(x, adapter)
    y = F.linear(x, w, bias)
    return y.addmm_(saved.h, b.to(x.dtype).t()), saved


def _gate_backward(dh: Tensor, p: Tensor, adapter: Adapter) -> Tensor:
    """dp = [gate_e dh | dlogits] from dh and p."""
    gate, dh = _gate(p, adapter), dh.to(p.dtype)
    # [M, E, R] [M, R, 1]
    dgate = torch.bmm(_experts(p, adapter), dh.unsqueeze(2)).squeeze(2)
    dp = torch.empty_like(p)
    torch.mul(gate.unsqueeze(2), dh.unsqueeze(1), out=_experts(dp, adapter))
    torch.mul(gate, dgate - (gate * dgate).sum(1, keepdim=True), out=dp[:, -gate.shape[1] :])
    return dp


def _soft_backward(dx: Tensor | None, dh: Tensor, x: Tensor, p: Tensor, adapter: Adapter, needs: Needs) -> Grads:
    """Add the low-rank part to dx; gradients of a and the router."""
    experts, rank, _ = adapter.a.shape
    cut = experts * rank
    dp = _gate_backward(dh, p, adapter).to(x.dtype)
    stacked = _stacked(adapter, x)
    if adapter.dropout is None:
        if dx is not None:
            dx.addmm_(dp, stacked)
        d = dp.t() @ x if needs.a or needs.router else None
    else:
        mask = dropout_mask(x, adapter.dropout)
        if dx is not None:
            dx.addmm_(dp[:, cut:], stacked[cut:]).addcmul_(dp[:, :cut] @ stacked[:cut], mask)
        d = torch.cat([dp[:, :cut].t() @ (x * mask), dp[:, cut:].t() @ x]) if needs.a or needs.router else None
    if d is None:
        return Grads(dx, None, None)
    return Grads(dx, d[:cut].view_as(adapter.a), d[cut:].clone())  # outputs of an op must not share memory


def _task_backward(dx: Tensor | None, dh: Tensor, x: Tensor, adapter: Adapter, needs: Needs) -> Grads:
    """Add the low-rank part to dx; gradient of each task's a, zero where a task has no rows."""
    a = adapter.a.to(x.dtype)
    mask = None if adapter.dropout is None else dropout_mask(x, adapter.dropout)
    dropped = x if mask is None else x * mask
    da = torch.zeros_like(a, dtype=acc_dtype(x)) if needs.a else None
    for task, rows in rows_of_tasks(adapter.task_groups):
        dh_rows = dh[rows]
        if dx is not None and mask is None:
            _accumulate(dx, rows, dh_rows, a[task])
        elif dx is not None and mask is not None:
            dx[rows] += (dh_rows @ a[task]) * mask[rows]
        if da is not None and da.dtype == x.dtype:
            da[task].addmm_(dh_rows.t(), dropped[rows])
        elif da is not None:  # runs of 16-bit rows are summed in float32
            da[task] += dh_rows.t() @ dropped[rows]
    return Grads(dx, da, None)


def shrink_backward(
    dh: Tensor, x: Tensor, adapter: Adapter, saved: Saved, needs: Needs, dx: Tensor | None = None
) -> Grads:
    """Gradients of `shrink` from the gradient of the UNSCALED h; the low-rank part of dx is added to dx in place."""
    if dx is None and needs.x:
        dx = torch.zeros_like(x)
    if adapter.router is None:
        grads = _task_backward(dx, dh, x, adapter, needs)
    else:
        grads = _soft_backward(dx, dh, x, saved.p, adapter, needs)
    return grads.cast_adapter(adapter)


def linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, adapter: Adapter, b: Tensor, saved: Saved, needs: Needs
) -> tuple[Grads, Tensor | None]:
    """Gradients of `linear` for x, a, router and b: dx = dy w + dp [a; router], db = dy^T h."""
    db = (dy.t() @ saved.h).to(b.dtype) if needs.b else None
    dx = dy @ w if needs.x else None
    if not (needs.x or needs.a or needs.router):
        return Grads(None, None, None), db
    dh = _product(dy, b.to(dy.dtype), adapter.scaling)
    return shrink_backward(dh, x, adapter, saved, needs, dx), db
