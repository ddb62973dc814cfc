"""Layers ALoRA is compared with: the authors' loop, HydraLoRA and a LoRA per task; plain torch under autograd.

`baselines.methods` and bench put them in the place of `nn.Linear`. The layers with tasks take the ids of the batch from
`with alora_kernels.route(ids): ...`; rows of id -1 get the base alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..modules.adapter import AdaptedLinear, reset_adapter_, task_names
from ..ops.torch_rows import Rows, Slots, Whole, layout_of


def authors_loop(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, bias: Tensor | None = None, scaling: float = 1.0,
    **routing: Tensor | None,
) -> Tensor:  # fmt: skip
    """The layer of the paper's release: one full `[M, N]` branch per expert, weighted and summed.

    Arguments are those of `reference.alora_linear`; `routing` is its router or its task_ids.

    Formula: `y = x W0^T + bias + sum_e s g_e (B (A_e x))`. Where the adapters are wider than x, it and the sum are as
    wide, as in PEFT.

    Source: Ban & Ji 2025, the released layer's structure (its class body is not copied).
    """
    wide = x.to(lora_A.dtype)
    g = reference.gate(wide, len(lora_A), **routing)
    y = F.linear(x, weight, bias)
    for e, a in enumerate(lora_A):
        y = y + g[..., e, None] * F.linear(F.linear(wide, a), lora_B) * scaling
    return y.to(x.dtype)


class HydraLinear(AdaptedLinear):
    """A frozen linear layer with one low-rank A and several B under a softmax router: soft-routed ALoRA mirrored.

    Formula: `y = x W0^T + bias + s sum_e g_e(x) B_e A dropout(x)`, g = softmax(x router^T).

    `lora_A` `[R, K]` and `router` `[E, K]` begin Kaiming-uniform, `lora_B` `[E, N, R]` at zero: what tells the B apart
    from the first step on is their gates. The router sees x before dropout, as ALoRA's. `options` are those of
    `AdaptedLinear`: lora_alpha, use_rslora, lora_dropout.

    Source: Tian et al. 2024, HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning.
    """

    def __init__(self, linear: nn.Linear, r: int, *, num_experts: int, **options: Any) -> None:
        super().__init__(linear, r, **options)
        if not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(f"num_experts must be a whole number >= 1, got {num_experts!r}")
        self.num_experts = num_experts
        self.lora_A = self._empty(r, self.in_features)
        self.lora_B = self._empty(num_experts, self.out_features, r)
        self.router = self._empty(num_experts, self.in_features)
        reset_adapter_(self.lora_A.detach().unsqueeze(0), self.lora_B, self.router)

    def _added(self, y: Tensor, x: Tensor, dropped: Tensor, leading: torch.Size) -> Tensor:
        h = F.linear(dropped, self.lora_A.to(x.dtype))  # [M, R]
        logits = F.linear(x, self.router.to(x.dtype))
        gate = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return mixed(y, h, (gate * self.scaling).to(h.dtype), self.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return f"{super().extra_repr()}, num_experts={self.num_experts}"


def mixed(y: Tensor, h: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    """y plus a mixture of several B over one h: one product with all B side by side, not E outputs of full width.

    Formula: `y_m + sum_e gate_me B_e h_m`, y `[M, N]`, h `[M, R]`, and in h's dtype gate `[M, E]`, b `[E, N, R]`.
    """
    # [M, E, 1] [M, 1, R]
    wide = (gate.unsqueeze(2) * h.unsqueeze(1)).flatten(1)
    # [M, E R] [E R, N]
    return torch.addmm(y, wide, b.transpose(1, 2).flatten(0, 1))


class TaskLinear(AdaptedLinear):
    """A layer whose rows have tasks: B `[E, N, R]`, and one A `[R, K]` or as many."""

    one_a = False

    def __init__(self, linear: nn.Linear, r: int, *, tasks: int | Sequence[str], **options: Any) -> None:
        super().__init__(linear, r, **options)
        self.tasks = task_names(tasks)
        count = len(self.tasks)
        self.lora_A = self._empty(*(() if self.one_a else (count,)), r, self.in_features)
        self.lora_B = self._empty(count, self.out_features, r)
        reset_adapter_(self.lora_A.detach().unsqueeze(0) if self.one_a else self.lora_A, self.lora_B)

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return f"{super().extra_repr()}, tasks={list(self.tasks)}"


class PerTaskLinear(TaskLinear):
    """A frozen linear layer with one LoRA per task.

    Formula: `y_m = x_m W0^T + bias + s B_t A_t dropout(x_m)`, t the task of row m. Rows of a task are multiplied
    together, in the row layouts of the torch backend: nothing is computed for tasks that are not in the batch, and
    short groups of rows go through one batched product.

    `tasks` is a count or different names; the ids of a batch pick the LoRA. `lora_A` `[E, R, K]` begins
    Kaiming-uniform, each A its own draw, `lora_B` `[E, N, R]` at zero. `options` as for `HydraLinear`.

    Source: Hu et al. 2022, LoRA, once for each task.
    """

    def _added(self, y: Tensor, x: Tensor, dropped: Tensor, leading: torch.Size) -> Tensor:
        layout = layout_of(self._routing().groups(leading, len(self.tasks), x.device))
        if isinstance(layout, Whole):
            a, b = (t[layout.task].to(x.dtype) for t in (self.lora_A, self.lora_B))
            return torch.addmm(y, F.linear(dropped, a) * self.scaling, b.t())
        if isinstance(layout, Slots):
            part, rows = self._in_slots(dropped, layout)
        else:
            part, rows = self._one_by_one(dropped, layout)
        return y + part if rows is None else y.index_add(0, rows, part)

    def _in_slots(self, x: Tensor, layout: Slots) -> tuple[Tensor, Tensor | None]:
        """The low-rank parts by two batched products, and the rows they are for: None where all are, in order."""
        a, b = (layout.matrices(t).to(x.dtype).transpose(1, 2) for t in (self.lora_A, self.lora_B))
        # [T, C, K] [T, K, R] [T, R, N]
        slots = torch.bmm(torch.bmm(layout.lay(x), a) * self.scaling, b)
        if layout.back is not None:
            return slots.flatten(0, 1).index_select(0, layout.back), None
        return layout.collect(slots), layout.rows

    def _one_by_one(self, x: Tensor, layout: list[tuple[int, Rows]]) -> tuple[Tensor, Tensor | None]:
        """The same with two products for each entry of the layout."""
        layout = layout or [(0, slice(0, 0))]  # no row has a task: gradients are zero, not absent
        present = sorted({task for task, _ in layout})
        a, b = (self._of(t, present, x.dtype) for t in (self.lora_A, self.lora_B))
        parts = [F.linear(F.linear(x[rows], a[task]) * self.scaling, b[task]) for task, rows in layout]
        return torch.cat(parts), _row_numbers([rows for _, rows in layout], x)

    def _of(self, stacked: Tensor, present: list[int], dtype: torch.dtype) -> dict[int, Tensor]:
        """The matrices of these tasks. `stacked[task]` would make a gradient as large as all tasks for each."""
        if len(present) < len(self.tasks):
            stacked = stacked.index_select(0, torch.tensor(present, device=stacked.device))
        return dict(zip(present, stacked.to(dtype).unbind(0), strict=True))


def _row_numbers(groups: list[Rows], x: Tensor) -> Tensor | None:
    """The rows of all groups one after the other, or None where these are the rows of x as they stand."""
    runs = [rows for rows in groups if isinstance(rows, slice)]  # all groups or none; in the order of the rows
    if runs and sum(rows.stop - rows.start for rows in runs) == x.shape[0]:
        return None
    every = torch.arange(x.shape[0], device=x.device)
    return torch.cat([every[rows] for rows in groups])
