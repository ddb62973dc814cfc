"""How an adapter starts: every A_e with its own draw, B zero, so the layer begins as its base.

In:   freshly allocated adapter tensors.
Out:  the same tensors, filled in place from torch's generator.
Who:  `FusedALoRALinear` and the PEFT tuner.

Identical A would make experts symmetric: their gradients would be equal and they would never part (and the
similarity of A across tasks that Ban & Ji 2025 trace back to a shared initialisation would be built in).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def reset_adapter_(lora_A: Tensor, lora_B: Tensor, router: Tensor | None = None) -> None:
    """Kaiming-uniform A_e and router (a = sqrt 5, as PEFT's LoRA and `nn.Linear`), zero B.

    Args:
        lora_A: `[E, R, K]`; each A_e is drawn on its own.
        lora_B: `[N, R]`.
        router: `[E, K]` or None.
    """
    for a in lora_A:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(lora_B)
    if router is not None:
        nn.init.kaiming_uniform_(router, a=math.sqrt(5))


def lora_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """s = lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def delta_weight(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s B A, `[N, K]`: what one task changes of the weight, from its A `[R, K]` and B `[N, R]`, computed in a dtype."""
    return scaling * (b.to(dtype) @ a.to(dtype))
