"""The formulas ALoRA is measured against in plain torch; `alora_kernels.baselines.layers` has the authors' loop.

Each gives the reference's values and is written as well as its idea allows: no handicap, no trick that the original
does not use. Arguments are those of `reference.alora_linear`; `routing` is its router or its task_ids.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alora_kernels import reference


def hoisted(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, bias: Tensor | None = None, scaling: float = 1.0,
    **routing: Tensor | None,
) -> Tensor:  # fmt: skip
    """The re-associated layer, eager: B is taken out of the sum, all A are one product.

    Formula: `y = x W0^T + bias + s (sum_e g_e A_e x) B^T`. The honest competitor: what a good engineer writes in torch
    without custom kernels.
    """
    experts, rank, _ = lora_A.shape
    p = F.linear(x, lora_A.flatten(0, 1)).unflatten(-1, (experts, rank))
    h = (reference.gate(x, experts, **routing).unsqueeze(-1) * p).sum(-2)
    return F.linear(x, weight, bias) + scaling * F.linear(h, lora_B)


def grouped_by_task(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, task_ids: Tensor, bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """Task routing, eager: one LoRA per task on that task's batch rows, the way mixed batches are hand-written.

    Formula: `y_t = x_t W0^T + bias + s (x_t A_t^T) B^T` for the rows of each task t present; ids per batch row.
    """
    y = F.linear(x, weight, bias)
    out = y.clone()
    for task in task_ids.unique().tolist():
        rows = (task_ids == task).nonzero().squeeze(-1)
        if task >= 0:
            out = out.index_add(0, rows, scaling * F.linear(F.linear(x[rows], lora_A[task]), lora_B))
    return out
