"""One command's run from beginning to end: open the CSV, measure, print tables; Ctrl-C keeps what was measured.

In:   works, modes, the CSV's path, and what the tables are about.
Out:  rows on disk and tables on standard output; the exit status.
Who:  `bench.cpu` and `bench.gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from .layers.work import Work
from .report import tables
from .report.machine import this_run
from .report.rows import Row
from .report.sheet import Sheet
from .report.targets import Target
from .run import Runner
from .timing import Clock

INTERRUPTED = 130  # what a shell reports for Ctrl-C


@dataclass
class Session:
    """What a command measures with.

    Attributes:
        command: "cpu" or "gpu", a column of every row.
        device: torch's name of it.
        out: the CSV.
        repeats: rounds.
        denominator: the provider that the tables divide by.
        targets: what is asked for.
        clock: wall time by default.
    """

    command: str
    device: str
    out: Path
    repeats: int
    denominator: str
    targets: Sequence[Target]
    clock: Clock | None = None

    def measure(self, works: Sequence[Work], modes: Sequence[str]) -> None:
        """Measure, print. Exits with 130 after Ctrl-C, with 1 where a result was wrong.

        Raises:
            typer.BadParameter: the CSV has other columns.
        """
        console = tables.console()
        sheet: Sheet[Row] = checked("--out", Sheet, self.out, Row)
        runner = Runner(sheet, this_run(self.command, self.device), repeats=self.repeats, clock=self.clock)
        interrupted = False
        try:
            runner.run(works, modes)
        except KeyboardInterrupt:
            interrupted = True
        for table in tables.of_cases(runner.rows, self.denominator, self.targets):
            console.print(table)
        measured = {row.case for row in runner.rows}
        asked = [t for t in self.targets if t.case in measured or t.case.endswith("*")]
        if asked and not interrupted:
            console.print(tables.of_targets(runner.rows, asked))
        console.print(f"interrupted: {sheet.summary}" if interrupted else sheet.summary, soft_wrap=True)
        if interrupted:
            raise typer.Exit(INTERRUPTED)
        if any(row.status == "wrong" for row in runner.rows):
            raise typer.Exit(1)


def choose(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The wanted names in the order of the known ones; all of them where nothing is wanted.

    Raises:
        typer.BadParameter: an unknown name; the message lists those that are known.
    """
    if unknown := [name for name in wanted or () if name not in known]:
        listed = ", ".join(known)
        raise typer.BadParameter(f"unknown {kind} {', '.join(map(repr, unknown))}: choose from {listed}")
    return [name for name in known if not wanted or name in wanted]


def checked(name: str, build: Any, *arguments: Any, **options: Any) -> Any:
    """Call `build`, with a `ValueError` of its as an error of the command line."""
    try:
        return build(*arguments, **options)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=name) from None
