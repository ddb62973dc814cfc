"""`HydraLinear`: HydraLoRA, the mirror image of soft-routed ALoRA: one A, several B under a learned router.

In:   activations; no task ids.
Out:  the base layer's output plus a mixture of low-rank parts, weighed for each token.
Who:  `baselines.methods`, as a method to compare with; users, by hand.

All B share h = x A^T, so the mixture is one product: the gate scales h once per expert, `[M, E R]`, and meets all B
side by side. The naive sum makes E outputs of full width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.adapter import AdaptedLinear
from ..modules.init import reset_adapter_


class HydraLinear(AdaptedLinear):
    """A frozen linear layer with one low-rank A and several B under a softmax router.

    Formula: `y = x W0^T + bias + s sum_e g_e(x) B_e A dropout(x)`, g = softmax(x router^T).

    Args:
        linear: the layer to replace.
        r: rank R.
        num_experts: E, the number of B.
        options: lora_alpha, use_rslora, lora_dropout, see `AdaptedLinear`.

    Attributes:
        lora_A: `[R, K]`, Kaiming-uniform.
        lora_B: `[E, N, R]`, zero: what tells the B apart from the first step on is their gates.
        router: `[E, K]`, Kaiming-uniform, as ALoRA's; it sees x before dropout.

    Raises:
        ValueError: num_experts < 1.

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
    """y plus a mixture of several B over one h, as one product with all B side by side.

    Formula: `y_m + sum_e gate_me B_e h_m`.

    Args:
        y: `[M, N]`.
        h: `[M, R]`.
        gate: `[M, E]`, in h's dtype.
        b: `[E, N, R]`, likewise.
    """
    # [M, E, 1] [M, 1, R]
    wide = (gate.unsqueeze(2) * h.unsqueeze(1)).flatten(1)
    # [M, E R] [E R, N]
    return torch.addmm(y, wide, b.transpose(1, 2).flatten(0, 1))
