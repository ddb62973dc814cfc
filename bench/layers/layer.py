"""A provider's layer on a problem, and the work of one layer: a case with the providers that take part in it.

`autograd.grad` instead of `backward`: nothing is accumulated, so nothing must be zeroed between two runs. A layer is
built once and used for all passes and modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from ..report.rows import BOTH, FORWARD, GRAPH, PASSES, Row
from ..run import Check, Ready, made_ready
from .problem import Case, Problem


@dataclass
class Layer:
    """One provider's layer on one problem: `forward` gives y `[batch, M/batch, N]` of its x.

    `rename` turns gradients of the leaves into those of the truth's tensor names, without the leading d. Layers that
    keep their weights in another shape turn the gradients back there, outside of what is timed.
    """

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    rename: Callable[[Sequence[Tensor]], Mapping[str, Tensor]]

    def step(self, direction: str, dy: Tensor) -> Callable[[], list[Tensor]]:
        """What is timed: [y], nothing kept for a backward, or [y, *gradients of the leaves] where `dy` is that of y."""

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


@dataclass(frozen=True)
class Provider:
    """One way to compute a layer; `computes` maps the routings it has to the function it computes for each.

    `missing` says why it cannot run a case on this machine, `uncapturable` why no CUDA graph can hold it, or None.
    """

    name: str
    computes: Mapping[str, str]
    build: Callable[[Problem], Layer]
    trains: bool = True
    missing: Callable[[Case], str | None] = lambda case: None
    uncapturable: str | None = None


class LayerWork:
    """One layer and the providers that compute something for its routing."""

    def __init__(
        self, case: Case, providers: Sequence[Provider], directions: Sequence[str] = PASSES, repeats: float = 1
    ) -> None:
        self.case, self.providers, self.directions, self.repeats = case, providers, directions, repeats
        sizes = {letter: getattr(case, letter) for letter in "mknre"}
        self.row = Row(case=case.name, routing=case.routing, dtype=str(case.dtype).removeprefix("torch."), **sizes)

    def candidates(self) -> Sequence[LayerCandidate]:
        """Providers of this routing, over one problem that is drawn when the first of them needs it."""
        problem = cache(lambda: Problem(self.case))
        return [LayerCandidate(self.case, problem, p) for p in self.providers if self.case.routing in p.computes]


class LayerCandidate:
    def __init__(self, case: Case, problem: Callable[[], Problem], provider: Provider) -> None:
        self.name, self.computes = provider.name, provider.computes[case.routing]
        self._case, self._problem, self._provider = case, problem, provider

    def reason(self, direction: str, mode: str) -> str | None:
        if direction == BOTH and not self._provider.trains:
            return "it has no backward"
        if mode == GRAPH and self._provider.uncapturable:
            return self._provider.uncapturable
        return self._provider.missing(self._case)

    def prepare(self, direction: str, mode: str) -> Ready:
        problem, layer = self._problem(), self._layer

        def judge(outputs: Sequence[Tensor]) -> Check:
            return problem.check(self.computes, layer.named(outputs), gradients=direction == BOTH)

        return made_ready(layer.step(direction, problem.tensor("dy")), self._case.device, mode, judge)

    @cached_property
    def _layer(self) -> Layer:
        return self._provider.build(self._problem())
