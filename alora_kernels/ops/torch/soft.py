"""Soft routing in torch calls: skinny products, gate and their gradients.

x, and x after dropout, come in the dtype of the skinny products. p holds `E*R` products and E logits side by side, so
that one product with x makes all of it. This backend keeps the gate in the place of the logits: the backward needs no
second softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...records import acc_dtype
from ..types import Adapter, Grads
from .products import add_product_


def _factors(adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a as `[E*R, K]` and the router."""
    assert adapter.router is not None
    return adapter.a.flatten(0, 1).to(dtype), adapter.router.to(dtype)


def _parts(p: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """The skinny products `[M, E, R]` and the gate (at first the logits) `[M, E]` inside p, as views."""
    experts, rank, _ = adapter.a.shape
    return p[:, : experts * rank].unflatten(1, (experts, rank)), p[:, experts * rank :]


def products(x: Tensor, dropped: Tensor, adapter: Adapter) -> Tensor:
    """p with the gate in the place of the logits, in `acc_dtype`; one product with x unless there is dropout."""
    a, router = _factors(adapter, x.dtype)
    p = x @ torch.cat((a, router)).t() if dropped is x else torch.cat((dropped @ a.t(), x @ router.t()), dim=1)
    p = p.to(acc_dtype(x.dtype))
    _, gate = _parts(p, adapter)
    gate.copy_(torch.softmax(gate.t().contiguous(), dim=0).t())  # experts first: four times faster on CPUs
    return p


def mixture(p: Tensor, adapter: Adapter) -> Tensor:
    """h = s sum_e gate_e p_e, in p's dtype."""
    low, gate = _parts(p, adapter)
    # [M, 1, E] [M, E, R]
    return torch.bmm((gate * adapter.scaling).unsqueeze(1), low).squeeze(1)


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


def backward(
    dx: Tensor | None,
    dh: Tensor,
    x: Tensor,
    p: Tensor,
    adapter: Adapter,
    dropped: Tensor,
    mask: Tensor | None,
    wanted: bool,
) -> Grads:
    """Add the low-rank part to dx in place; the gradients of a and router, if wanted."""
    dp = _gate_backward(dh.to(p.dtype), p, adapter).to(x.dtype)
    a, router = _factors(adapter, x.dtype)
    low, logits = dp.split([a.shape[0], router.shape[0]], 1)
    if dx is not None and mask is None:
        add_product_(dx, dp, torch.cat((a, router)))
    elif dx is not None and mask is not None:  # which the router does not see
        dx.add_((low @ a).mul_(mask).addmm_(logits, router))
    if not wanted:
        return Grads(dx, None, None)
    if mask is not None:
        return Grads(dx, (low.t() @ dropped).view_as(adapter.a), logits.t() @ x)
    da, drouter = (dp.t() @ x).split([a.shape[0], router.shape[0]])
    return Grads(dx, da.view_as(adapter.a), drouter.clone())  # outputs of an op must not share memory
