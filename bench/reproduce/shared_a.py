"""`SharedALinear`: one A for all tasks and a B for each, ALoRA the other way round.

In:   activations, and the ids of the batch from the routing context.
Out:  the base layer's output plus the low-rank part of each row's task.
Who:  `sharing`, the arm that shares A without a learned router, so that nothing but the shared matrix differs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alora_kernels.baselines.hydra import mixed
from alora_kernels.modules.adapter import AdaptedLinear
from alora_kernels.modules.init import reset_adapter_
from alora_kernels.routing import current_routing


class SharedALinear(AdaptedLinear):
    """A frozen linear layer with one A and one B per task.

    Formula: `y_m = x_m W0^T + bias + s B_t A dropout(x_m)`, t the task of row m.

    Args:
        linear: the layer to replace.
        r: rank R.
        tasks: names; the ids of a batch pick the B.

    Attributes:
        lora_A: `[R, K]`, Kaiming-uniform.
        lora_B: `[E, N, R]`, zero.
    """

    def __init__(self, linear: nn.Linear, r: int, *, tasks: tuple[str, ...], lora_alpha: float | None = None) -> None:
        super().__init__(linear, r, lora_alpha=lora_alpha)
        self.tasks = tasks
        self.lora_A = self._empty(r, self.in_features)
        self.lora_B = self._empty(len(tasks), self.out_features, r)
        reset_adapter_(self.lora_A.detach().unsqueeze(0), self.lora_B)

    def _added(self, y: Tensor, x: Tensor, dropped: Tensor, leading: torch.Size) -> Tensor:
        routing = current_routing()
        if routing is None:
            raise ValueError("call the model inside `with alora_kernels.route(ids): ...`")
        ids = routing.groups(leading, len(self.tasks), x.device).ids.long()
        h = F.linear(dropped, self.lora_A) * self.scaling  # [M, R]
        # all B side by side behind a hard gate; E R is 40 here, so the zeros cost little
        gate = F.one_hot(ids.clamp(min=0), len(self.tasks)) * (ids >= 0).unsqueeze(1)
        return mixed(y, h, gate.to(h.dtype), self.lora_B)


def share_a(
    encoder: nn.Module, r: int, tasks: tuple[str, ...], lora_alpha: float | None, targets: tuple[str, ...] = ()
) -> nn.Module:
    """Every linear layer of an encoder (or those so called) with one A and a B per task; the encoder is changed."""
    encoder.requires_grad_(False)
    linears = [(name, m) for name, m in encoder.named_modules() if type(m) is nn.Linear]
    for name, linear in linears:
        if targets and not f".{name}".endswith(tuple(f".{target}" for target in targets)):
            continue
        encoder.set_submodule(name, SharedALinear(linear, r, tasks=tasks, lora_alpha=lora_alpha))
    return encoder
