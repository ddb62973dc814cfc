"""Rows as tables on a terminal: one per case, pass and mode, and one of the targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .rows import FAILED, WRONG, Row, grouped
from .targets import Target, judge, on_row

WIDTH = 170  # where there is no terminal to ask


def console() -> Console:
    """Standard output, wide enough for a table where it is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def table(title: str, left: Sequence[str], right: Sequence[str], **options: Any) -> Table:
    """An empty table of columns with text and columns with numbers."""
    made = Table(title=title, **options)
    for name in left:
        made.add_column(name)
    for name in right:
        made.add_column(name, justify="right")
    return made


def of_cases(rows: Sequence[Row], denominator: str, targets: Sequence[Target]) -> Iterator[Table]:
    """A table per case, pass and mode, fastest first, what was not timed last."""
    for same in grouped(rows, lambda row: row.group):
        first = same[0]
        notes = dict.fromkeys(row.note for row in same if row.note and row.timed)
        peaks = any(row.peak_mb is not None for row in same)
        numbers = ["p20 ms", "p50 ms", "p80 ms", f"/ {denominator}", "target", "error / allowed"]
        made = table(
            f"{first.case}: {first.direction}, {first.mode}; {first.sizes}",
            ["provider", "computes"],
            numbers + ["tokens/s"] * first.whole_model + ["peak MB"] * peaks,
            caption="; ".join([first.device, f"torch {first.torch}", first.commit, *notes]),
        )
        base = next((row for row in same if row.provider == denominator and row.timed), None)
        for row in fastest_first(same):
            asked = on_row(row, denominator, rows, targets)
            met = "" if asked is None else {None: "", True: " met", False: " MISSED"}[asked.met]
            cells = _cells(row, base, "" if asked is None else asked.target.bound(asked.target.must) + met)
            made.add_row(*cells[: len(made.columns)], style=style(row, row.provider.startswith("fused")))
        yield made


def of_targets(
    rows: Sequence[Any], targets: Sequence[Target], title: str = "targets: p50, ratios inside one run", digits: int = 3
) -> Table:
    """Target, what must be, what is aimed at, what was measured, met or not; no column that would be empty."""
    wide, aimed = any(len(t.above.group) > 2 for t in targets), any(t.aim is not None for t in targets)
    made = table(title, ["case", "pass"] * wide + ["ratio"], ["must", *["aim"] * wide, "measured", "met"])
    for verdict in (judge(target, rows) for target in targets):
        t = verdict.target
        measured = verdict.reason if verdict.measured is None else f"{verdict.measured:.{digits}f}"
        met = {None: "", True: "yes", False: "NO"}[verdict.met]
        if aimed and verdict.met and t.aim is not None and t.reached(verdict.measured or 0.0, t.aim):
            met = "yes, aim too"
        cells = [*[t.case, t.direction] * wide, t.ratio_of, t.bound(t.must), *[t.bound(t.aim)] * wide, measured, met]
        made.add_row(*cells, style="red" if verdict.met is False else None)
    return made


def fastest_first(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.p50_ms if row.timed and row.p50_ms else float("inf"))


def shown_ms(value: float | None) -> str:
    """Milliseconds with three digits that count, never as a power of ten."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def style(row: Any, ours: bool) -> str | None:
    """How a row of a record with a status is shown: what is wrong in red, what was not timed dim, ours bold."""
    if row.status == WRONG or row.status.startswith(FAILED.rstrip(": ")):
        return "red"
    return "dim" if not row.timed else "bold" if ours else None


def _cells(row: Row, base: Row | None, target: str) -> list[str]:
    error = "" if row.worst_error is None else f"{row.worst_error:.1e} / {row.allowed_error:.1e}"
    speed = ["" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"] * row.whole_model
    peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
    if not row.timed or row.p50_ms is None:
        status = row.status if row.status != WRONG else f"WRONG, not timed; {row.note}"
        return [row.provider, f"{row.computes}: {status}", "", "", "", "", "", error, *speed, peak]
    times = [shown_ms(value) for value in (row.p20_ms, row.p50_ms, row.p80_ms)]
    ratio = "" if base is None or not base.p50_ms else f"{row.p50_ms / base.p50_ms:.2f}"
    return [row.provider, row.computes, *times, ratio, target, error, *speed, peak]
