"""The record of `bench chaos`, the table of it, and what docs/security.md shows: the newest row of each attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..report import tables
from ..report.readme import markdown
from ..report.rows import newest

GROWTH = 0.02  # of memory, from which on it counts as a leak
FILES = 2  # descriptors that may be open more than before: a connection that is just being closed
LEFT = ("attack", "acts")
RIGHT = ("tried", "survived", "refused", "lost", "wrong", "MB before", "after", "growth", "files before", "after", "s")


@dataclass(frozen=True)
class Row:
    """One attack of one run. What was tried has survived, was refused by name, was lost, or was answered wrongly."""

    attack: str = ""
    commit: str = ""
    date: str = ""  # start of the attack
    device: str = ""
    torch: str = ""
    seed: int = 0
    acts: int = 0  # of the attack; `unit` says of what kind
    unit: str = ""
    tried: int = 0
    survived: int = 0
    refused: int = 0  # of those that survived: not answered, with the reason that the state of things gave
    lost: int = 0
    wrong: int = 0
    mb_before: float | None = None  # resident memory of the server, after a quarter of the acts and after all
    mb_after: float | None = None
    files_before: float | None = None  # open descriptors of the server, sockets too
    files_after: float | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def growth(self) -> float | None:
        return None if self.mb_before is None or self.mb_after is None else self.mb_after / self.mb_before - 1

    @property
    def held(self) -> bool:
        """Whether nothing was lost or wrong, and nothing grew."""
        files = (self.files_after or 0) - (self.files_before or 0)
        return not self.lost and not self.wrong and (self.growth or 0) < GROWTH and files <= FILES

    def cells(self) -> list[str]:
        """Texts of the columns LEFT and RIGHT."""
        counts = [self.tried, self.survived, self.refused, self.lost, self.wrong]
        growth = "" if self.growth is None else f"{100 * self.growth:+.1f} %"
        levels = [self.mb_before, self.mb_after, self.files_before, self.files_after]
        before, after, opened, open_ = ("" if level is None else f"{level:.0f}" for level in levels)
        return [
            self.attack, f"{self.acts:,} {self.unit}", *(f"{count:,}" for count in counts),
            before, after, growth, opened, open_, f"{self.seconds:.0f}",
        ]  # fmt: skip


def table(rows: Sequence[Row]) -> Table:
    """For a terminal; what did not hold is red."""
    made = tables.table("chaos", LEFT, RIGHT)
    for row in rows:
        made.add_row(*row.cells(), style=None if row.held else "red")
    return made


def block(rows: Sequence[Row], source: str) -> str:
    """For the page: where and when, the table, and the notes."""
    shown = newest(rows, lambda row: row.attack)
    runs = dict.fromkeys(f"{row.device}, torch {row.torch}, commit {row.commit}, {row.date[:10]}" for row in shown)
    every = f"all rows, with commit and date of each: [{Path(source).name}]({source})."
    about = f"`python -m bench chaos`; {'; '.join(runs)}; {every}"
    notes = [f"- {row.attack}: {row.note}." for row in shown if row.note]
    return "\n".join([about, "", *markdown(LEFT, RIGHT, (row.cells() for row in shown)), "", *notes])
