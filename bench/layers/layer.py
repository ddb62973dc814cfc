"""A provider's layer on a problem, and the work of one layer: a case with the providers that take part in it.

`autograd.grad` instead of `backward`: nothing is accumulated, so nothing must be zeroed between two runs. A layer is
built once and used for all passes and modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..report.rows import BOTH, FORWARD, GRAPH, PASSES, Row
from ..run import Candidate, Check, Ready, Work, made_ready
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


def layer_work(
    case: Case, providers: Sequence[Provider], directions: Sequence[str] = PASSES, repeats: float = 1
) -> Work:
    """One layer and the providers that compute something for its routing, over one problem that all of them share."""
    sizes = {letter: getattr(case, letter) for letter in "mknre"}
    row = Row(case=case.name, routing=case.routing, dtype=str(case.dtype).removeprefix("torch."), **sizes)

    def candidates() -> list[Candidate]:
        problem = cache(lambda: Problem(case))  # drawn when the first of them needs it
        return [_candidate(case, problem, p) for p in providers if case.routing in p.computes]

    return Work(row, directions, candidates, repeats)


def _candidate(case: Case, problem: Callable[[], Problem], provider: Provider) -> Candidate:
    computes, layer = provider.computes[case.routing], cache(lambda: provider.build(problem()))

    def reason(direction: str, mode: str) -> str | None:
        if direction == BOTH and not provider.trains:
            return "it has no backward"
        if mode == GRAPH and provider.uncapturable:
            return provider.uncapturable
        return provider.missing(case)

    def prepare(direction: str, mode: str) -> Ready:
        def judge(outputs: Sequence[Tensor]) -> Check:
            return problem().check(computes, layer().named(outputs), gradients=direction == BOTH)

        return made_ready(layer().step(direction, problem().tensor("dy")), case.device, mode, judge)

    return Candidate(provider.name, computes, reason, prepare)
