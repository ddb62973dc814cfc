"""The mirror image of task-routed ALoRA, which `sharing` compares it with: one A for all tasks and a B for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alora_kernels.baselines.layers import TaskLinear, mixed


class SharedALinear(TaskLinear):
    """A frozen linear layer with one A for all tasks and one B per task: task-routed ALoRA mirrored.

    Formula: `y_m = x_m W0^T + bias + s B_t A dropout(x_m)`, t the task of row m. Arguments as for `PerTaskLinear`;
    `lora_A` `[R, K]` begins Kaiming-uniform, `lora_B` `[E, N, R]` at zero.
    """

    one_a = True

    def _added(self, y: Tensor, x: Tensor, dropped: Tensor, leading: torch.Size) -> Tensor:
        ids = self._routing().groups(leading, len(self.tasks), x.device).ids.long()
        h = F.linear(dropped, self.lora_A.to(x.dtype)) * self.scaling  # [M, R]
        gate = F.one_hot(ids.clamp(min=0), len(self.tasks)) * (ids >= 0).unsqueeze(1)  # hard; a few zeros cost little
        return mixed(y, h, gate.to(h.dtype), self.lora_B.to(x.dtype))
