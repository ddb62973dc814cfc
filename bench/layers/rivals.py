"""Layers of papers in plain torch, each as well as its idea allows; `alora_kernels.baselines.formulas` has more.

What a batch makes once for all layers (a sort, bounds of groups) is made outside of what is timed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Layer, over
from .problem import Case, Problem


class _OneLora(torch.autograd.Function):
    """y = x w^T + s x a^T b^T, accumulated in place in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:  # type: ignore[override]
        rows = x.view(-1, x.shape[-1])
        h = rows @ a.t()
        y = rows @ w.t()
        y.addmm_(h, b.t(), alpha=s)
        ctx.save_for_backward(rows, w, a, b, h)
        ctx.scaling = s
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, w, a, b, h = ctx.saved_tensors
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dh = (dy_rows @ b).mul_(ctx.scaling)
        db = (dy_rows.t() @ h).mul_(ctx.scaling)
        dx = dy_rows @ w
        dx.addmm_(dh, a)
        return dx.view(*dy.shape[:-1], w.shape[1]), None, dh.t() @ rows, db, None


def addmm(problem: Problem) -> Layer:
    """One LoRA with a hand-written backward: the fastest that plain torch calls give.

    No tensor of y's size besides y, no second one besides dx in the backward, and h is kept instead of computed again.
    Written from that idea, not from anybody's code.
    """
    w = problem.given.weight

    def forward(x: Tensor, a1: Tensor, b: Tensor) -> Tensor:
        return _OneLora.apply(x, w, a1.to(x.dtype), b.to(x.dtype), problem.scaling)  # type: ignore[no-any-return]

    return over(problem, "lora", forward)


def grouped_missing(case: Case) -> str | None:
    """`grouped_mm` on CUDA takes bf16 only, and float64 nowhere."""
    if case.device != "cpu" and case.dtype != torch.bfloat16:
        return "grouped_mm takes bf16 on CUDA devices"
    return None


def grouped(problem: Problem) -> Layer:
    """Multi-LoRA on `grouped_mm`, what a good engineer writes today without the shared B; sorted rows stay."""
    c = problem.case
    ids = problem.ids.repeat_interleave(c.m // c.batch)
    order = torch.argsort(ids, stable=True)
    ends = torch.bincount(ids, minlength=c.e).cumsum(0).to(torch.int32)
    is_sorted = bool((ids[1:] >= ids[:-1]).all())
    inverse = torch.argsort(order)
    w = problem.given.weight

    def forward(x: Tensor, a: Tensor, bs: Tensor) -> Tensor:
        rows = x.view(-1, c.k) if is_sorted else x.view(-1, c.k)[order]
        h = F.grouped_mm(rows, a.to(x.dtype).transpose(1, 2), offs=ends) * problem.scaling
        low = F.grouped_mm(h, bs.to(x.dtype).transpose(1, 2), offs=ends)
        return F.linear(x, w) + (low if is_sorted else low[inverse]).view(c.batch, -1, c.n)

    return over(problem, "multi", forward)


def hydra(problem: Problem) -> Layer:
    """HydraLoRA: one A, a router, and all B kept as one `[N, E*R]` matrix, the layout that suits the forward.

    The sum over experts is one product: the rows g_e h are laid side by side. A loop of E products of full width gives
    the same values and takes longer. Source: Tian et al. 2024, HydraLoRA, its formula.
    """
    x, a1, router = (problem.tensor(name) for name in ("x", "a1", "router"))
    bs = problem.tensor("bs")
    experts, out, rank = bs.shape
    wide_b = bs.detach().transpose(0, 1).reshape(out, experts * rank).clone().requires_grad_()

    def forward() -> Tensor:
        g = F.softmax(F.linear(x, router.to(x.dtype)), dim=-1)
        h = F.linear(x, a1.to(x.dtype)) * problem.scaling
        wide = (g.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)
        return F.linear(x, problem.given.weight) + F.linear(wide, wide_b.to(x.dtype))

    def rename(grads: Any) -> dict[str, Tensor]:
        dx, da1, drouter, dwide = grads
        return {"x": dx, "a1": da1, "router": drouter, "bs": dwide.unflatten(1, (experts, rank)).transpose(0, 1)}

    return Layer(forward, [x, a1, router, wide_b], rename)
