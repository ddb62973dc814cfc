"""What the runner runs: a case, and for each provider a way to get ready for it.

In:   a `Case` and providers.
Out:  candidates: why one cannot take part, or its callable, verified, with its peak memory.
Who:  `bench.run` takes any `Work`; `LayerWork` is one layer, `bench.models.training` has a whole model.

A layer is built once and used for all passes and modes. In CUDA graph mode it is the replay's result that is judged,
not that of an eager call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from .. import cuda
from ..report.rows import GRAPH, Row
from .layer import BOTH, FORWARD, Layer
from .problem import Case, Check, Problem
from .providers import Provider


@dataclass(frozen=True)
class Ready:
    """A callable, what was found of its result, and what it needs at its peak (None: not known on CPUs)."""

    run: Callable[[], object]
    check: Check
    peak_mb: float | None = None


class Candidate(Protocol):
    """One provider of one case."""

    name: str
    computes: str

    def reason(self, direction: str, mode: str) -> str | None:
        """Why it takes no part in this pass and mode, or None."""

    def prepare(self, direction: str, mode: str) -> Ready:
        """Build, run once, judge."""


class Work(Protocol):
    """A case with its candidates.

    Attributes:
        row: the columns that describe the case.
        directions: the passes to measure.
        repeats: rounds, as a factor of what the user asked for: short calls want more of them.
    """

    row: Row
    directions: Sequence[str]
    repeats: float

    def candidates(self) -> Sequence[Candidate]:
        """Those that have a part in the case; nothing is built yet."""


class LayerWork:
    """One layer and the providers that compute something for its routing."""

    def __init__(
        self, case: Case, providers: Sequence[Provider], directions: Sequence[str] = (FORWARD, BOTH), repeats: float = 1
    ) -> None:
        self.case, self.providers, self.directions, self.repeats = case, providers, directions, repeats
        sizes = {letter: getattr(case, letter) for letter in "mknre"}
        self.row = Row(case=case.name, routing=case.routing, dtype=str(case.dtype).removeprefix("torch."), **sizes)

    def candidates(self) -> Sequence[LayerCandidate]:
        """Providers of this routing, over one problem that is drawn when the first of them needs it."""
        shared = _Shared(self.case)
        return [LayerCandidate(shared, p) for p in self.providers if self.case.routing in p.computes]


class _Shared:
    """The problem that the candidates of one case share."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.case)


class LayerCandidate:
    """One provider on one layer."""

    def __init__(self, shared: _Shared, provider: Provider) -> None:
        self.name, self.computes = provider.name, provider.computes[shared.case.routing]
        self._shared, self._provider = shared, provider

    def reason(self, direction: str, mode: str) -> str | None:
        """Why it takes no part, or None."""
        if direction == BOTH and not self._provider.trains:
            return "it has no backward"
        if mode == GRAPH and self._provider.uncapturable:
            return self._provider.uncapturable
        return self._provider.missing(self._shared.case)

    def prepare(self, direction: str, mode: str) -> Ready:
        """Build the layer, capture it if asked to, and judge what it gives."""
        problem = self._shared.problem
        run: Callable[[], Sequence[Tensor]] = self._layer.step(direction, problem.tensor("dy"))
        peak = cuda.peak_mb(run, problem.case.device)
        if mode == GRAPH:
            run = cuda.capture(run)
        named = self._layer.named(run())
        return Ready(run, problem.check(self.computes, named, gradients=direction == BOTH), peak)

    @cached_property
    def _layer(self) -> Layer:
        return self._provider.build(self._shared.problem)
