"""Tasks that a batch does not hold keep their A as it is.

In:   an optimiser and the stacked `lora_A` parameters `[E, R, K]`.
Out:  two hooks around its step: rows whose gradient is exactly zero keep their values and moments.
Who:  `ALoRATrainer`; usable with any `torch.optim.Optimizer`.

Why: all A of a layer are one tensor, so a momentum optimiser would move an absent task along its old gradient and
weight decay would shrink it, more often the rarer the task. What stays shared is the optimiser's step count (bias
correction), which is one number per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class KeepAbsentTasks:
    """Restore the rows of absent tasks after each optimiser step, without a transfer to the host.

    Args:
        optimizer: any torch optimiser whose state tensors have the parameter's shape.
        parameters: stacked A matrices; the first dimension counts tasks.

    Note:
        A gradient of exactly zero also occurs while B is zero, before the first step: A then waits one step.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._restore),
        )

    def remove(self) -> None:
        """Take the hooks off the optimiser."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = [
            (p, p.detach().clone(), {key: value.clone() for key, value in _moments(optimizer, p)})
            for p in self._parameters
            if p.grad is not None
        ]

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p, values, moments in self._before:
            assert p.grad is not None
            absent = (p.grad == 0).flatten(1).all(1).view(-1, *[1] * (p.dim() - 1))
            p.copy_(torch.where(absent, values, p))
            for key, value in _moments(optimizer, p):
                # a moment born in this step starts at zero
                value.copy_(torch.where(absent, moments.get(key, torch.zeros_like(value)), value))
        self._before = []


def _moments(optimizer: Optimizer, p: nn.Parameter) -> list[tuple[str, Tensor]]:
    """The optimiser's per-entry state of one parameter."""
    state = optimizer.state.get(p, {})
    return [(key, value) for key, value in state.items() if isinstance(value, Tensor) and value.shape == p.shape]
