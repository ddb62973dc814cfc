"""`PerTaskLinear`: a LoRA of its own for each task, A and B both, in one layer for mixed batches.

In:   activations, and the ids of the batch from the routing context, `with alora_kernels.route(ids): ...`.
Out:  the base layer's output plus each row's own low-rank part; rows of id -1 get the base alone.
Who:  `baselines.methods`, as a method to compare with; users, by hand.

Rows of a task are multiplied together, in the row layouts of the torch backend (`ops.torch_rows`): nothing is computed
for tasks that are not in the batch, and short groups of rows go through one batched product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.adapter import AdaptedLinear
from ..modules.init import reset_adapter_
from ..modules.tasks import task_names
from ..ops.torch.rows import Rows, Slots, Whole, layout_of
from ..recompute import noted
from ..routing import ConstantRouting, Routing, current_routing


class PerTaskLinear(AdaptedLinear):
    """A frozen linear layer with one LoRA per task.

    Formula: `y_m = x_m W0^T + bias + s B_t A_t dropout(x_m)`, t the task of row m.

    Args:
        linear: the layer to replace.
        r: rank R.
        tasks: a count or a list of names; the ids of a batch pick the LoRA.
        options: lora_alpha, use_rslora, lora_dropout, see `AdaptedLinear`.

    Attributes:
        lora_A: `[E, R, K]`, Kaiming-uniform, each A its own draw.
        lora_B: `[E, N, R]`, zero.
        tasks: task names.

    Raises:
        ValueError: no task, or repeated names.

    Source: Hu et al. 2022, LoRA, once for each task.
    """

    def __init__(self, linear: nn.Linear, r: int, *, tasks: int | Sequence[str], **options: Any) -> None:
        super().__init__(linear, r, **options)
        self.tasks = task_names(tasks)
        self.lora_A = self._empty(len(self.tasks), r, self.in_features)
        self.lora_B = self._empty(len(self.tasks), self.out_features, r)
        reset_adapter_(self.lora_A, self.lora_B)

    def _routing(self) -> Routing:
        """The routing context, or the only task.

        Raises:
            ValueError: several tasks, and nobody says which.
        """
        routing: Routing | None = noted(self, current_routing, routed=len(self.tasks) > 1)
        if routing is not None:
            return routing.at(self, self.rows)
        if len(self.tasks) == 1:
            return ConstantRouting(0)
        raise ValueError(
            f"this layer has the tasks {', '.join(self.tasks)}: call the model inside"
            " `with alora_kernels.route(ids): ...`"
        )

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

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return f"{super().extra_repr()}, tasks={list(self.tasks)}"


def _row_numbers(groups: list[Rows], x: Tensor) -> Tensor | None:
    """The rows of all groups one after the other, or None where these are the rows of x as they stand."""
    slices = [rows for rows in groups if isinstance(rows, slice)]
    if len(slices) == len(groups) and sum(rows.stop - rows.start for rows in slices) == x.shape[0]:
        return None  # runs come in the order of the rows
    numbers = [torch.arange(g.start, g.stop, device=x.device) if isinstance(g, slice) else g.long() for g in groups]
    return torch.cat(numbers)
