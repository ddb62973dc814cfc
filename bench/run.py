"""The runner: prepare, verify, time, one row each, on disk as they come.

In:   works (cases with candidates), modes, a clock, an open sheet.
Out:  rows; what is wrong, out of memory or cannot run is a row too, and the run goes on.
Who:  `bench.cpu` and `bench.gpu`.

No result is timed that was not found right, and all that is compared with one another is timed in the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import cuda
from .layers.work import Candidate, Ready, Work
from .report.rows import FAILED, NOT_AVAILABLE, OK, OUT_OF_MEMORY, WRONG, Row
from .report.sheet import Sheet
from .timing import Clock, Timing, interleaved

WARMUP = 5


class Runner:
    """Measures works one after the other.

    Args:
        sheet: where rows go.
        base: the columns that are the same for the whole run; see `bench.report.machine.this_run`.
        repeats: rounds per case, times each work's own factor.
        clock: wall time by default.
        console: where the progress bar is shown; standard error by default.
    """

    def __init__(
        self, sheet: Sheet[Row], base: Row, *, repeats: int, clock: Clock | None = None, console: Console | None = None
    ) -> None:
        self.sheet, self.base, self.repeats, self.clock = sheet, base, repeats, clock
        self.rows: list[Row] = []
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(20),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console or Console(stderr=True),
            transient=True,
        )

    def run(self, works: Sequence[Work], modes: Sequence[str]) -> list[Row]:
        """Measure all works in all passes and modes.

        Returns:
            All rows. After an exception, also `KeyboardInterrupt`, `self.rows` has those made before it.
        """
        with self._bar:
            total = sum(len(work.directions) * len(modes) for work in works)
            self._task = self._bar.add_task("", total=total)
            for work in works:
                candidates = work.candidates()
                for direction in work.directions:
                    for mode in modes:
                        self._group(work, candidates, direction, mode)
                        self._bar.advance(self._task)
                del candidates
                cuda.release()
        return self.rows

    def _group(self, work: Work, candidates: Sequence[Candidate], direction: str, mode: str) -> None:
        """Everything that is compared with one another: verify each, then time all that are right together."""
        where = f"{work.row.case}, {direction}, {mode}"
        ready: dict[str, tuple[Row, Ready]] = {}
        for candidate in candidates:
            self._bar.update(self._task, description=f"{where}: verifying {candidate.name}")
            row = self._describe(work, candidate, direction, mode)
            status, prepared = self._prepare(candidate, direction, mode)
            if prepared is not None:
                check = prepared.check
                errors = {"worst_error": check.worst, "allowed_error": check.allowed, "peak_mb": prepared.peak_mb}
                row = replace(row, **errors)  # type: ignore[arg-type]
                if status == OK:
                    ready[candidate.name] = row, prepared
                    continue
                row = replace(row, note=f"worst tensor: {check.where}")
            self._add(replace(row, status=status))
        for name, timing in self._time(work, {name: r for name, (_, r) in ready.items()}, where).items():
            row = ready[name][0]
            if isinstance(timing, Timing):
                times = {f"p{q}_ms": 1e3 * getattr(timing, f"p{q}") for q in (20, 50, 80)}
                self._add(replace(row, **times))  # type: ignore[arg-type]
            else:
                self._add(replace(row, status=_status_of(timing)))

    def _prepare(self, candidate: Candidate, direction: str, mode: str) -> tuple[str, Ready | None]:
        """The status of a candidate, and the candidate itself where it gave a result."""
        if (reason := candidate.reason(direction, mode)) is not None:
            return NOT_AVAILABLE + reason, None
        try:
            prepared = candidate.prepare(direction, mode)
        except Exception as error:
            status = _status_of(error)
        else:
            return (OK if prepared.check.ok else WRONG), prepared
        cuda.release()  # only here, when the exception no longer holds the frames and their tensors
        return status, None

    def _time(self, work: Work, ready: dict[str, Ready], where: str) -> dict[str, Timing | Exception]:
        if not ready:
            return {}
        rounds = max(1, math.ceil(self.repeats * work.repeats))
        warmup = min(WARMUP, math.ceil(rounds / 4))

        def show(turn: int) -> None:
            self._bar.update(self._task, description=f"{where}: round {turn} of {warmup + rounds}")

        runs = {name: r.run for name, r in ready.items()}
        return interleaved(runs, repeats=rounds, warmup=warmup, clock=self.clock, on_round=show)

    def _describe(self, work: Work, candidate: Candidate, direction: str, mode: str) -> Row:
        """The row of a candidate before anything is known of it."""
        run = {name: getattr(self.base, name) for name in ("command", "commit", "date", "device", "torch", "triton")}
        return replace(
            work.row, **run, direction=direction, mode=mode, provider=candidate.name, computes=candidate.computes
        )

    def _add(self, row: Row) -> None:
        self.sheet.add(row)
        self.rows.append(row)


def _status_of(error: BaseException) -> str:
    """How an exception is reported: memory that ran out apart from everything else, one line."""
    text = " ".join(str(error).split())
    ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate" in text
    if ran_out:
        return OUT_OF_MEMORY
    return f"{FAILED}{type(error).__name__}: {text[:200]}"
