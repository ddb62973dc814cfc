"""One LoRA with a hand-written backward: the low-rank part is added in place to the base product by `addmm_`.

In:   x, the frozen weight, a1 `[R, K]`, b `[N, R]`.
Out:  y = x w^T + s x a1^T b^T, and dx, da1, db.
Who:  `bench.layers.providers` under the name "Unsloth-style addmm".

The fastest single LoRA that plain torch calls give: no tensor of y's size besides y, no second one besides dx in the
backward, and h is kept instead of computed again. Written from that idea, not from anybody's code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layer import Layer, over
from ..problem import Problem


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


def build(problem: Problem) -> Layer:
    """One adapter for all rows."""
    w = problem.given.weight

    def forward(x: Tensor, a1: Tensor, b: Tensor) -> Tensor:
        y = _OneLora.apply(x, w, a1.to(x.dtype), b.to(x.dtype), problem.scaling)
        assert isinstance(y, Tensor)
        return y

    return over(problem, "lora", forward)
