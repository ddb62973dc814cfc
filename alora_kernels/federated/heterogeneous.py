"""A linear layer whose rank is the client's own and whose shared part has the same shape everywhere.

In:   a plain `nn.Linear`, the client's rank r and the shared rank d_m.
Out:  `HetALoRALinear`; the fused op with A := M A and B := B + B2 B1.
Who:  `adapters.adapt` for the method `fed-alora-het`.

A `[r, K]` and M `[d_m, r]` stay with the client. What it teaches the others is B2 B1, `[N, r] [r, d_m]`, on top of the
merged B `[N, d_m]`, which is a buffer: the server's mean replaces it and B2 begins at zero again.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..ops import alora_linear
from ..routing import ConstantRouting


class HetALoRALinear(nn.Module):
    """A frozen linear layer with one low-rank path of the client's own rank.

    Formula: `y = x W0^T + bias + s (M A x) (B + B2 B1)^T`.

    Args:
        base_layer: the layer to adapt; its weight and bias are frozen and shared, not copied.
        r: the client's rank.
        d_m: rank of the shared space.
        scaling: s, alpha / r in the paper.

    Attributes:
        lora_A: `[r, K]`, private.
        lora_M: `[d_m, r]`, private.
        lora_B1: `[r, d_m]`, private.
        lora_B2: `[N, r]`, private, zero at the start of each round.
        lora_B: `[N, d_m]`, a buffer: what all clients have learned so far.

    Raises:
        TypeError: base_layer is not an `nn.Linear`.

    Source: Ban & Ji 2025, Fed-ALoRA with unequal ranks.
    """

    def __init__(self, base_layer: nn.Linear, r: int, d_m: int, scaling: float) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"unequal ranks adapt nn.Linear layers only, got {type(base_layer).__name__}")
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.d_m, self.scaling = r, d_m, scaling
        weight = base_layer.weight
        dtype = weight.dtype if weight.dtype.itemsize >= 4 else torch.float32  # adapters train in 32 bits or more

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=weight.device)

        self.lora_A = nn.Parameter(zeros(r, base_layer.in_features))
        self.lora_M = nn.Parameter(zeros(d_m, r))
        self.lora_B1 = nn.Parameter(zeros(r, d_m))
        self.lora_B2 = nn.Parameter(zeros(base_layer.out_features, r))
        self.register_buffer("lora_B", zeros(base_layer.out_features, d_m))

    def merged_b(self) -> Tensor:
        """B + B2 B1, `[N, d_m]`: what this client would have everybody use."""
        return torch.addmm(cast(Tensor, self.lora_B), self.lora_B2, self.lora_B1)

    def forward(self, x: Tensor) -> Tensor:
        """y `[..., N]` from x `[..., K]`."""
        return alora_linear(
            x,
            self.base_layer.weight,
            (self.lora_M @ self.lora_A)[None],
            self.merged_b(),
            bias=self.base_layer.bias,
            task_ids=ConstantRouting(0),
            scaling=self.scaling,
        )

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return f"r={self.r}, d_m={self.d_m}, scaling={self.scaling:g}"
