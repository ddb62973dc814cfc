"""Soft routing in torch calls: skinny products, gate and their gradients, for one adapter or several that share x.

In:   x and x after dropout, in the dtype of the skinny products; adapters with a router.
Out:  p and the mixture h; in the backward dx in place, and the gradients of every a and router.
Who:  `ops.torch_backend`, and `ops.torch_group` for layers that read the same x.

p holds `E*R` products and E logits per adapter, side by side, so that one product with x makes all of it. This backend
keeps the gate in the place of the logits: the backward needs no second softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mixed import add_product_
from ..types import Adapter, Grads, acc_dtype


def router_of(adapter: Adapter) -> Tensor:
    """The router of a soft-routed adapter."""
    assert adapter.router is not None
    return adapter.router


def _widths(adapters: Sequence[Adapter]) -> list[int]:
    """Columns of p that belong to each adapter: E*R products and E logits."""
    return [ad.a.shape[0] * (ad.a.shape[1] + 1) for ad in adapters]


def products_and_gate(p: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """The skinny products `[M, E, R]` and the gate (at first the logits) `[M, E]` inside one adapter's p, as views."""
    experts, rank, _ = adapter.a.shape
    return p[:, : experts * rank].unflatten(1, (experts, rank)), p[:, experts * rank :]


def _stacked(adapters: Sequence[Adapter], x: Tensor) -> Tensor:
    """a and router of each adapter below those of the one before, in x's dtype."""
    return torch.cat([part for ad in adapters for part in (ad.a.flatten(0, 1), router_of(ad))]).to(x.dtype)


def products(x: Tensor, dropped: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """p of all adapters, gates in the place of logits, in `acc_dtype`; one product with x unless there is dropout."""
    if dropped is x:
        p = x @ _stacked(adapters, x).t()
    else:
        sides = [(dropped @ ad.a.to(x.dtype).flatten(0, 1).t(), x @ router_of(ad).to(x.dtype).t()) for ad in adapters]
        p = torch.cat([side for pair in sides for side in pair], dim=1)
    p = p.to(acc_dtype(x))
    for part, adapter in zip(p.split(_widths(adapters), 1), adapters, strict=True):
        _, gate = products_and_gate(part, adapter)
        gate.copy_(torch.softmax(gate.t().contiguous(), dim=0).t())  # experts first: four times faster on CPUs
    return p


def mixtures(p: Tensor, adapters: Sequence[Adapter]) -> list[Tensor]:
    """The unscaled h of each adapter."""
    return [mixture(part, ad, 1.0) for part, ad in zip(p.split(_widths(adapters), 1), adapters, strict=True)]


def mixture(p: Tensor, adapter: Adapter, scaling: float) -> Tensor:
    """h = s sum_e gate_e p_e of one adapter, in p's dtype."""
    low, gate = products_and_gate(p, adapter)
    # [M, 1, E] [M, E, R]
    return torch.bmm((gate * scaling).unsqueeze(1), low).squeeze(1)


def _gate_backward(dh: Tensor, p: Tensor, dp: Tensor, adapter: Adapter) -> None:
    """dp = [gate_e dh | dlogits] of one adapter, from dh and p."""
    low, gate = products_and_gate(p, adapter)
    dlow, dlogits = products_and_gate(dp, adapter)
    # [M, E, R] [M, R, 1]
    dgate = torch.bmm(low, dh.unsqueeze(2)).squeeze(2)
    torch.mul(gate.unsqueeze(2), dh.unsqueeze(1), out=dlow)
    torch.mul(gate, dgate - (gate * dgate).sum(1, keepdim=True), out=dlogits)


def backward(
    dx: Tensor | None,
    dhs: Sequence[Tensor],
    x: Tensor,
    p: Tensor,
    adapters: Sequence[Adapter],
    dropped: Tensor,
    mask: Tensor | None,
    wanted: bool,
) -> list[Grads]:
    """Add the low-rank part of all adapters to dx in place; the gradients of each a and router, if wanted."""
    dp = torch.empty_like(p)
    parts = (t.split(_widths(adapters), 1) for t in (p, dp))
    for dh, part, dpart, adapter in zip(dhs, *parts, adapters, strict=True):
        _gate_backward(dh.to(p.dtype), part, dpart, adapter)
    dp = dp.to(x.dtype)
    if mask is not None:
        dps = dp.split(_widths(adapters), 1)
        return [
            _dropped_backward(dx, part, x, ad, dropped, mask, wanted) for part, ad in zip(dps, adapters, strict=True)
        ]
    if dx is not None:
        add_product_(dx, dp, _stacked(adapters, x))
    if not wanted:
        return [Grads(dx, None, None)] * len(adapters)
    d = dp.t() @ x
    found: list[Grads] = []
    for part, adapter in zip(d.split(_widths(adapters)), adapters, strict=True):
        cut = adapter.a.shape[0] * adapter.a.shape[1]
        da = part[:cut].view_as(adapter.a)
        # outputs of an op must not share memory, but one of them may keep d
        found.append(Grads(dx, da.clone() if found else da, part[cut:].clone()))
    return found


def _dropped_backward(
    dx: Tensor | None, dp: Tensor, x: Tensor, adapter: Adapter, dropped: Tensor, mask: Tensor, wanted: bool
) -> Grads:
    """The same for one adapter under dropout, which the router does not see."""
    a, router = adapter.a.to(x.dtype).flatten(0, 1), router_of(adapter).to(x.dtype)
    low, logits = dp.split([a.shape[0], router.shape[0]], 1)
    if dx is not None:
        dx.add_((low @ a).mul_(mask).addmm_(logits, router))
    if not wanted:
        return Grads(dx, None, None)
    return Grads(dx, (low.t() @ dropped).view_as(adapter.a), logits.t() @ x)
