"""The functions that providers compute, each as one plain formula in torch.

In:   the frozen weight, ids, the scaling and the trainable tensors by name, in any float dtype.
Out:  the layer's output; autograd derives the gradients. In float64 it is the truth, in the case's own dtype it
      says how far off plain torch is, which is what every provider is allowed twice of.
Who:  `bench.layers.problem`.

Alternatives to ALoRA compute other functions (one LoRA, one B per task, a mixture of B), so a time is only
comparable together with the name of its function: every row of a result says which one it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alora_kernels import reference


@dataclass(frozen=True)
class Given:
    """What is fixed: the frozen weight `[N, K]`, one id per batch row, and s."""

    weight: Tensor
    ids: Tensor
    scaling: float


@dataclass(frozen=True)
class Function:
    """A layer as a formula: which tensors it trains, and y of them."""

    leaves: tuple[str, ...]
    formula: Callable[..., Tensor]


def _frozen(given: Given, x: Tensor) -> Tensor:
    return F.linear(x, given.weight)


def _lora(given: Given, x: Tensor, a1: Tensor, b: Tensor) -> Tensor:
    """y = x w^T + s x a1^T b^T: one adapter for all rows."""
    low = F.linear(F.linear(x, a1.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, given.weight) + given.scaling * low


def _task(given: Given, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return reference.alora_linear(x, given.weight, a, b, task_ids=given.ids, scaling=given.scaling)


def _soft(given: Given, x: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
    return reference.alora_linear(x, given.weight, a, b, router=router, scaling=given.scaling)


def _multi(given: Given, x: Tensor, a: Tensor, bs: Tensor) -> Tensor:
    """y = x w^T + s x a_t^T b_t^T: every task has its own B, as in ordinary multi-LoRA."""
    g = reference.gate(x, a.shape[0], None, given.ids)
    p = torch.einsum("...k,erk->...er", x, a.to(x.dtype))
    low = torch.einsum("...er,enr->...n", g.unsqueeze(-1) * p, bs.to(x.dtype))
    return F.linear(x, given.weight) + given.scaling * low


def _hydra(given: Given, x: Tensor, a1: Tensor, bs: Tensor, router: Tensor) -> Tensor:
    """y = x w^T + s sum_e g_e(x) b_e a1 x (HydraLoRA: one A, several B)."""
    g = reference.gate(x, bs.shape[0], router, None)
    h = F.linear(x, a1.to(x.dtype))
    y = F.linear(x, given.weight)
    for e, b in enumerate(bs):
        y = y + given.scaling * g[..., e, None] * F.linear(h, b.to(x.dtype))
    return y


def _poly(given: Given, x: Tensor, a: Tensor, bs: Tensor, logits: Tensor) -> Tensor:
    """y = x w^T + x A_t^T B_t^T / R with A_t, B_t the task's own mixture of all skills (Polytropon)."""
    g = torch.sigmoid(logits[given.ids])
    g = g / g.sum(-1, keepdim=True)
    mixed_a = torch.einsum("be,erk->brk", g, a).to(x.dtype)
    mixed_b = torch.einsum("be,enr->bnr", g, bs).to(x.dtype)
    return F.linear(x, given.weight) + x @ mixed_a.mT @ mixed_b.mT / a.shape[1]


#: by the name that a row's column `computes` holds
FUNCTIONS: dict[str, Function] = {
    "frozen": Function(("x",), _frozen),
    "lora": Function(("x", "a1", "b"), _lora),
    "task": Function(("x", "a", "b"), _task),
    "soft": Function(("x", "a", "b", "router"), _soft),
    "multi": Function(("x", "a", "bs"), _multi),
    "hydra": Function(("x", "a1", "bs", "router"), _hydra),
    "poly": Function(("x", "a", "bs", "logits"), _poly),
}
