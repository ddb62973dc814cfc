"""Works whose candidates do what a test says, and a clock that only counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.report.rows import FORWARD, Row
from bench.run import Check, Ready
from bench.timing import Run

RIGHT, WRONG = Check(1e-7, 1e-6, "y"), Check(0.5, 1e-6, "da")


class CountingClock:
    """Every call takes as many seconds as calls were made before it, plus one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, run: Run) -> float:
        run()
        self.calls += 1
        return float(self.calls)


@dataclass
class FakeCandidate:
    name: str
    check: Check = RIGHT
    missing: str | None = None
    preparing: Callable[[], None] = lambda: None
    running: Callable[[], None] = lambda: None
    computes: str = "task"
    runs: int = 0

    def reason(self, direction: str, mode: str) -> str | None:
        return self.missing

    def prepare(self, direction: str, mode: str) -> Ready:
        self.preparing()
        return Ready(self.run, self.check)

    def run(self) -> None:
        self.running()
        self.runs += 1


@dataclass
class FakeWork:
    fakes: Sequence[FakeCandidate]
    row: Row = field(default_factory=lambda: Row(case="fake 1", routing="task", m=1, k=1, n=1, r=1, e=1))
    directions: Sequence[str] = (FORWARD,)
    repeats: float = 1.0

    def candidates(self) -> Sequence[FakeCandidate]:
        return self.fakes


def raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run
