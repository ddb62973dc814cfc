"""A chip, a clock and layers that do what a test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alora_kernels.kernels.tuned import Table
from alora_kernels.tuning.run import Shape, Tuner

CPU = torch.device("cpu")
KEY = {"chip": "Fake 9000", "driver": "1.2", "torch": "2.99", "triton": "3.99", "alora-kernels": "0.1.0"}
SHAPES = (Shape("long square", 4096, 64, 64), Shape("decode square", 8, 64, 64))


class FakeLayer:
    """Every plan is right; `wrong` and `raced` are asked for faults by name."""

    faults: Mapping[str, Any] = {}  # plan -> words, or an error to raise
    races: Mapping[str, Any] = {}
    asked: list[str] = []  # noqa: RUF012

    def __init__(self, routing: str, m: int, *sizes: Any, **_: Any) -> None:
        self.routing, self.m, self.x = routing, m, torch.empty(0, dtype=torch.float16)

    def wrong(self, plan: str) -> str:
        self.asked.append(f"{self.routing}/{plan}")
        return self._answer(self.faults.get(f"{self.routing}/{plan}", ""))

    def raced(self, plan: str, repeats: int) -> str:
        return self._answer(self.races.get(f"{self.routing}/{plan}", ""))

    def _answer(self, what: Any) -> str:
        if isinstance(what, BaseException):
            raise what
        return what() if callable(what) else what

    def infer(self, plan: str) -> list[Tensor]:
        return []

    def train(self, plan: str) -> list[Tensor]:
        return []

    def launcher(self, kernel: str) -> Callable[[], object]:
        return lambda: kernel


def device(seconds: Callable[[Any], float] = lambda name: 1.0, **others: Any) -> Any:
    """A `Gpu` whose times a test makes up, by plan or tile."""

    def times(runs: Mapping[Any, Any]) -> dict[Any, float]:
        return {name: seconds(name) for name in runs}

    given = {"ready": lambda step: step, "alive": lambda: None, "now": lambda: 0.0, "hung": lambda name: None}
    facts = {"place": CPU, "dtype": torch.float16, "room": 10**6, "release": lambda: None}
    return SimpleNamespace(seconds=times, **{**facts, **given, **others})


def tuner(table: Table | None = None, machine: Any = None, **others: Any) -> Tuner:
    """One run over small shapes."""
    return Tuner(table or Table(dict(KEY)), SHAPES, machine or device(), repeats=4, **others)
