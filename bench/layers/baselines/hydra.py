"""HydraLoRA's layer: one A shared by all experts, a B for each, a router.

In:   x, the frozen weight, a1 `[R, K]`, all B side by side `[N, E*R]`, router `[E, K]`.
Out:  y = x w^T + s sum_e g_e(x) b_e a1 x.
Who:  `bench.layers.providers` under the name "HydraLoRA".

The sum over experts is one product: the rows g_e h are laid side by side against all B side by side. A loop of E
products of full width gives the same values and takes longer. Source: Tian et al. 2024, HydraLoRA, its formula.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..layer import Layer
from ..problem import Problem


def build(problem: Problem) -> Layer:
    """All B are kept as one `[N, E*R]` matrix, the layout that suits the forward."""
    x, a1, router = (problem.tensor(name) for name in ("x", "a1", "router"))
    bs = problem.tensor("bs")
    experts, out, rank = bs.shape
    wide_b = bs.detach().transpose(0, 1).reshape(out, experts * rank).clone().requires_grad_()

    def forward() -> Tensor:
        g = F.softmax(F.linear(x, router.to(x.dtype)), dim=-1)
        h = F.linear(x, a1.to(x.dtype)) * problem.scaling
        wide = (g.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)
        return F.linear(x, problem.given.weight) + F.linear(wide, wide_b.to(x.dtype))

    def rename(grads: list[Tensor]) -> dict[str, Tensor]:
        dx, da1, drouter, dwide = grads
        dbs = dwide.unflatten(1, (experts, rank)).transpose(0, 1)
        return {"x": dx, "a1": da1, "router": drouter, "bs": dbs}

    return Layer(forward, [x, a1, router, wide_b], rename)  # type: ignore[arg-type]
