"""A provider's layer, ready to run: what a pass of it is, and what its gradients are called.

In:   a forward without arguments over a problem's tensors.
Out:  `step(pass)`, the thing that is timed: the forward alone, or forward and backward by `autograd.grad`.
Who:  `bench.layers.providers` and `bench.layers.baselines` make layers, `bench.layers.work` runs them.

`autograd.grad` instead of `backward`: nothing is accumulated, so nothing must be zeroed between two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
Forward = Callable[[], Tensor]
Rename = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]


@dataclass
class Layer:
    """One provider's layer on one problem.

    Attributes:
        forward: y `[batch, M/batch, N]` of the problem's x.
        leaves: what gradients are taken of.
        rename: gradients of the leaves -> gradients by the truth's tensor names, without the leading d. Layers that
            keep their weights in another shape turn the gradients back here, outside of what is timed.
    """

    forward: Forward
    leaves: Sequence[Tensor]
    rename: Rename

    def step(self, direction: str, dy: Tensor) -> Callable[[], list[Tensor]]:
        """What is timed: [y], or [y, *gradients of the leaves].

        Args:
            direction: "forward" (inference, nothing is kept) or "forward+backward".
            dy: the gradient of y.
        """

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return [self.forward()]

        def train() -> list[Tensor]:
            y = self.forward()
            return [y, *torch.autograd.grad(y, self.leaves, dy)]

        return infer if direction == FORWARD else train

    def named(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """What `step` gave, by the names of the truth."""
        y, *grads = outputs
        return {"y": y.detach()} | ({f"d{k}": g for k, g in self.rename(grads).items()} if grads else {})


def over(problem: Problem, function: str, forward: Callable[..., Tensor]) -> Layer:
    """A layer whose forward takes the function's tensors by name, as they are."""
    leaves = problem.leaves(function)
    return Layer(lambda: forward(**leaves), list(leaves.values()), lambda grads: dict(zip(leaves, grads, strict=True)))
