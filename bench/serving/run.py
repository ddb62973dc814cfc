"""Measures providers under loads: verify each, then repeats in shuffled order, a row each, on disk as they come.

Nothing is timed whose tokens were not found right; and some of what was timed is judged again, because only then
requests come and go at different moments. Every repeat starts its server anew and lets it answer a short wave first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..report.rows import FAILED, NOT_AVAILABLE, OK, WRONG
from ..report.sheet import Sheet
from .adapters import Check, Truth
from .load import Load, Outcome, numbers, requests_of
from .providers import Provider
from .rows import BASE, Repeat

WARM_TOKENS = 2  # a prefill and a step


@dataclass(frozen=True)
class Job:
    provider: Provider
    load: Load

    @property
    def row(self) -> dict[str, object]:
        load = self.load
        note = {"note": "the tasks of the load play no part"} if self.provider.name == BASE else {}
        sizes = {name: getattr(load, name) for name in ("popularity", "tasks", "concurrency", "requests", "new_tokens")}
        adapter_mb = self.provider.adapter_bytes(load) / 1e6
        return {"provider": self.provider.name, **sizes, "adapter_mb": adapter_mb, **note}

    @property
    def title(self) -> str:
        return f"{self.provider.name}, {self.load.popularity} over {self.load.tasks}"


@dataclass
class Runner:
    """Measures jobs; `run` holds the columns of the whole run, `truth` judges tokens, `show` is told what is done."""

    sheet: Sheet[Repeat]
    run: Repeat
    texts: Sequence[tuple[int, ...]]
    truth: Truth
    show: Callable[[str], None] = lambda text: None
    rows: list[Repeat] = field(default_factory=list)

    def measure(self, jobs: Sequence[Job], repeats: int) -> list[Repeat]:
        """All rows. After an exception, also `KeyboardInterrupt`, `self.rows` has those made before it."""
        ready = [job for job in jobs if self._verified(job)]
        order = random.Random(0)
        for repeat in range(repeats):
            order.shuffle(ready)
            for job in list(ready):
                self.show(f"repeat {repeat + 1} of {repeats}: {job.title}")
                if not self._timed(job, repeat):
                    ready.remove(job)
        return self.rows

    def _verified(self, job: Job) -> bool:
        """Whether one wave's answers are right; if not, a row says so."""
        self.show(f"verifying {job.title}")
        if (reason := job.provider.missing(job.load)) is not None:
            return self._add(job, status=NOT_AVAILABLE + reason)
        load = job.load.warm()
        try:
            with job.provider.opened(job.load) as serve:
                outcomes = serve(requests_of(load, self.texts), load.new_tokens)
            check = self.truth.check(outcomes, load.new_tokens)
        except Exception as error:
            return self._add(job, status=_failure(error))
        return not check.wrong or self._add(job, check)

    def _timed(self, job: Job, repeat: int) -> bool:
        load = job.load
        try:
            with job.provider.opened(load) as serve:
                serve(requests_of(load.warm(), self.texts), WARM_TOKENS)
                start = time.perf_counter()
                outcomes = serve(requests_of(load, self.texts), load.new_tokens)
                wall = time.perf_counter() - start
            check = self.truth.check(_some(outcomes, load.concurrency), load.new_tokens)
        except Exception as error:
            return self._add(job, repeat=repeat, status=_failure(error))
        measured = numbers(outcomes, wall) | dict(job.provider.extras)
        return self._add(job, check, repeat=repeat, **({} if check.wrong else measured))

    def _add(self, job: Job, check: Check | None = None, **columns: object) -> bool:
        """Write a row; whether it is a good one."""
        if check is not None:
            columns |= {"checked": check.tokens, "equal": check.equal / check.tokens if check.tokens else None}
            columns |= {"status": WRONG, "note": check.wrong} if check.wrong else {}
        row = replace(self.run, **{**job.row, **columns})  # type: ignore[arg-type]
        self.sheet.add(row)
        self.rows.append(row)
        return row.status == OK


def _some(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """So many, spread evenly over the run."""
    step = max(1, len(outcomes) // count)
    return list(outcomes[::step])[:count]


def _failure(error: Exception) -> str:
    return f"{FAILED}{type(error).__name__}: {' '.join(str(error).split())[:200]}"
