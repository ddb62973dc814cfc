"""One command's run: prepare, verify, time, one row each, on disk as they come; tables at the end, also after Ctrl-C.

No result is timed that was not found right, and all that is compared with one another is timed in the same rounds. What
is wrong, out of memory or cannot run is a row too, and the run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import timing
from .report import tables
from .report.readme import replace_block
from .report.rows import FAILED, GRAPH, NOT_AVAILABLE, OK, OUT_OF_MEMORY, WRONG, Row, origin
from .report.sheet import Sheet
from .report.targets import Target
from .timing import Clock, Timing, interleaved, release

WARMUP = 5
INTERRUPTED = 130  # what a shell reports for Ctrl-C


@dataclass(frozen=True)
class Check:
    """The worst tensor: its error, what is allowed for it, and its name."""

    worst: float
    allowed: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether the result is right; an error that is not a number is not."""
        return self.worst <= self.allowed


@dataclass(frozen=True)
class Ready:
    """A callable, what was found of its result, and what it needs at its peak (None: not known on CPUs)."""

    run: Callable[[], object]
    check: Check
    peak_mb: float | None = None


def made_ready(step: Callable[[], Any], device: str, mode: str, judge: Callable[[Any], Check]) -> Ready:
    """A step as it is timed in a mode, with what `judge` finds of its outputs: in CUDA graph mode of the replay's."""
    peak = timing.peak_mb(step, device)
    run = timing.capture(step) if mode == GRAPH else step
    return Ready(run, judge(run()), peak)


@dataclass(frozen=True)
class Candidate:
    """One provider of one case: `reason` says why it takes no part in a pass and mode, `prepare` builds and judges."""

    name: str
    computes: str
    reason: Callable[[str, str], str | None]
    prepare: Callable[[str, str], Ready]


@dataclass(frozen=True)
class Work:
    """A case (its columns in `row`) with its candidates, of which nothing is built yet.

    `repeats` is a factor on the rounds the user asked for: short calls want more of them.
    """

    row: Row
    directions: Sequence[str]
    candidates: Callable[[], Sequence[Candidate]]
    repeats: float = 1.0


class Runner:
    """Measures works one after the other; `run` holds the columns that are the same for the whole run."""

    def __init__(self, sheet: Sheet[Row], run: dict[str, Any], *, repeats: int, clock: Clock | None = None) -> None:
        self.sheet, self.repeats, self.clock = sheet, repeats, clock
        self.rows: list[Row] = []
        self._run = run
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(20),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )

    def run(self, works: Sequence[Work], modes: Sequence[str]) -> list[Row]:
        """All rows; after an exception, also `KeyboardInterrupt`, `self.rows` has those made before it."""
        with self._bar:
            self._task = self._bar.add_task("", total=sum(len(work.directions) * len(modes) for work in works))
            for work in works:
                candidates = work.candidates()
                for direction in work.directions:
                    for mode in modes:
                        self._group(work, candidates, direction, mode)
                        self._bar.advance(self._task)
                del candidates
                release()
        return self.rows

    def _group(self, work: Work, candidates: Sequence[Candidate], direction: str, mode: str) -> None:
        """Everything that is compared with one another: verify each, then time all that are right together."""
        where = f"{work.row.case}, {direction}, {mode}"
        ready: dict[str, tuple[Row, Ready]] = {}
        for candidate in candidates:
            self._bar.update(self._task, description=f"{where}: verifying {candidate.name}")
            known: dict[str, Any] = {
                "direction": direction,
                "mode": mode,
                "provider": candidate.name,
                "computes": candidate.computes,
            }
            row = replace(work.row, **self._run, **known)
            status, prepared = self._prepare(candidate, direction, mode)
            if prepared is None:
                self._add(row, status=status)
                continue
            check = prepared.check
            row = replace(row, worst_error=check.worst, allowed_error=check.allowed, peak_mb=prepared.peak_mb)
            if check.ok:
                ready[candidate.name] = row, prepared
            else:
                self._add(row, status=WRONG, note=f"worst tensor: {check.where}")
        for name, found in self._time(work, {name: r for name, (_, r) in ready.items()}, where).items():
            if isinstance(found, Timing):
                self._add(ready[name][0], **{f"p{q}_ms": 1e3 * getattr(found, f"p{q}") for q in (20, 50, 80)})
            else:
                self._add(ready[name][0], status=_status_of(found))

    def _prepare(self, candidate: Candidate, direction: str, mode: str) -> tuple[str, Ready | None]:
        """A candidate that gave a result, or the status that says why there is none."""
        if (reason := candidate.reason(direction, mode)) is not None:
            return NOT_AVAILABLE + reason, None
        try:
            return OK, candidate.prepare(direction, mode)
        except Exception as error:
            status = _status_of(error)
        release()  # only here, when the exception no longer holds the frames and their tensors
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

    def _add(self, row: Row, **columns: Any) -> None:
        row = replace(row, **columns)
        self.sheet.add(row)
        self.rows.append(row)


def _status_of(error: BaseException) -> str:
    """How an exception is reported: memory that ran out apart from everything else, one line."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate" in text:
        return OUT_OF_MEMORY
    return f"{FAILED}{type(error).__name__}: {text[:200]}"


def measure(
    command: str,
    device: str,
    works: Sequence[Work],
    modes: Sequence[str],
    *,
    out: Path,
    repeats: int,
    denominator: str,
    targets: Sequence[Target],
    clock: Clock | None = None,
) -> None:
    """Measure into the CSV `out` and print tables, whose times are divided by the provider `denominator`'s.

    Exits with 130 after Ctrl-C, with 1 where a result was wrong. `device` is torch's name of it.
    """
    console = tables.console()
    sheet: Sheet[Row] = checked("--out", Sheet, out, Row)
    runner = Runner(sheet, {"command": command, **origin(device, "triton")}, repeats=repeats, clock=clock)
    interrupted = False
    try:
        runner.run(works, modes)
    except KeyboardInterrupt:
        interrupted = True
    for table in tables.of_cases(runner.rows, denominator, targets):
        console.print(table)
    measured = {row.case for row in runner.rows}
    asked = [t for t in targets if t.case in measured or t.case.endswith("*")]
    if asked and not interrupted:
        console.print(tables.of_targets(runner.rows, asked))
    finish(console, sheet, runner.rows, interrupted)


def finish(console: Console, sheet: Sheet[Any], rows: Sequence[Any], interrupted: bool) -> None:
    """Say what was written where; 130 after Ctrl-C, 1 where a result was wrong."""
    console.print(f"interrupted: {sheet.summary}" if interrupted else sheet.summary, soft_wrap=True)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row.status == WRONG for row in rows):
        raise typer.Exit(1)


def choose(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The wanted names in the order of the known ones; all of them where nothing is wanted."""
    if unknown := [name for name in wanted or () if name not in known]:
        listed = ", ".join(known)
        raise typer.BadParameter(f"unknown {kind} {', '.join(map(repr, unknown))}: choose from {listed}")
    return [name for name in known if not wanted or name in wanted]


def write_block(page: Path, name: str, text: str) -> None:
    """Put a result into its block of a page; a page without the block is bad input."""
    page.write_text(checked("--page", replace_block, page.read_text(), name, text))


def conclude(page: Path, name: str, text: str, *, right: bool, whole: bool = True) -> None:
    """Print a result and put it into its block of the page; exit 1 if it is wrong; a part is not put there."""
    typer.echo(f"\n{text}")
    if not right:
        raise typer.Exit(1)
    if whole and page.exists():
        write_block(page, name, text)


def checked(name: str | None, build: Any, *arguments: Any) -> Any:
    """Call `build`, with its errors as those of an option of the command line."""
    try:
        return build(*arguments)
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint=name) from None
