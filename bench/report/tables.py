"""Rows as tables on a terminal: one per case, pass and mode, and one of the targets.

In:   the rows of a run, the provider that ratios are taken to, the targets.
Out:  `rich` tables.
Who:  `bench.cpu` and `bench.gpu`, at the end of a run, also of one that was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from .rows import Row, grouped
from .targets import Target, judge

WIDTH = 170  # where there is no terminal to ask


def console() -> Console:
    """Standard output, wide enough for a table where it is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def of_cases(rows: Sequence[Row], denominator: str, targets: Sequence[Target]) -> Iterator[Table]:
    """A table per case, pass and mode, fastest first, what was not timed last."""
    for same in grouped(rows).values():
        first = same[0]
        sizes = " ".join(f"{letter.upper()}={getattr(first, letter)}" for letter in "mknre")
        title = f"{first.case}: {first.direction}, {first.mode}; {sizes} {first.dtype}"
        notes = dict.fromkeys(row.note for row in same if row.note and row.timed)
        table = Table(title=title, caption="; ".join([first.device, f"torch {first.torch}", first.commit, *notes]))
        for name in ("provider", "computes"):
            table.add_column(name)
        peaks = any(row.peak_mb is not None for row in same)
        numbers = ["p20 ms", "p50 ms", "p80 ms", f"/ {denominator}", "target", "error / allowed"]
        for name in numbers + ["tokens/s"] * first.whole_model + ["peak MB"] * peaks:
            table.add_column(name, justify="right")
        base = next((row for row in same if row.provider == denominator and row.timed), None)
        for row in sorted(same, key=lambda row: row.p50_ms if row.timed and row.p50_ms else float("inf")):
            cells = _cells(row, base, _target_cell(row, denominator, rows, targets))
            table.add_row(*cells[: len(table.columns)], style=_style(row))
        yield table


def of_targets(rows: Sequence[Row], targets: Sequence[Target]) -> Table:
    """Target, what must be, what is aimed at, what was measured, met or not."""
    table = Table(title="targets: p50, ratios inside one run")
    for name in ("case", "pass", "ratio"):
        table.add_column(name)
    for name in ("must", "aim", "measured", "met"):
        table.add_column(name, justify="right")
    for verdict in (judge(target, rows) for target in targets):
        t = verdict.target
        measured = verdict.reason if verdict.measured is None else f"{verdict.measured:.3f}"
        met = {None: "", True: "yes", False: "NO"}[verdict.met]
        if verdict.met and t.aim is not None and verdict.measured is not None and t.reached(verdict.measured, t.aim):
            met = "yes, aim too"
        style = "red" if verdict.met is False else None
        table.add_row(t.case, t.direction, t.ratio_of, wanted(t, t.must), wanted(t, t.aim), measured, met, style=style)
    return table


def wanted(target: Target, value: float | None) -> str:
    """A bound with its direction."""
    return "" if value is None else f"{'≤' if target.at_most else '≥'} {value:.2f}"


def shown_ms(value: float | None) -> str:
    """Milliseconds with three digits that count, never as a power of ten."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cells(row: Row, base: Row | None, target: str) -> list[str]:
    error = "" if row.worst_error is None else f"{row.worst_error:.1e} / {row.allowed_error:.1e}"
    speed = ["" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"] * row.whole_model
    peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
    if not row.timed or row.p50_ms is None:
        status = row.status if row.status != "wrong" else f"WRONG, not timed; {row.note}"
        return [row.provider, f"{row.computes}: {status}", "", "", "", "", "", error, *speed, peak]
    times = [shown_ms(value) for value in (row.p20_ms, row.p50_ms, row.p80_ms)]
    ratio = "" if base is None or not base.p50_ms else f"{row.p50_ms / base.p50_ms:.2f}"
    return [row.provider, row.computes, *times, ratio, target, error, *speed, peak]


def _target_cell(row: Row, denominator: str, rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """The bound on this row's ratio, and whether it is met."""
    for target in targets:
        mine = (target.case, target.direction, target.mode) == row.group and target.quantity == "p50_ms"
        if mine and (target.numerator, target.denominator) == (row.provider, denominator):
            met = judge(target, rows).met
            return wanted(target, target.must) + {None: "", True: " met", False: " MISSED"}[met]
    return ""


def _style(row: Row) -> str | None:
    if row.status == "wrong" or row.status.startswith("failed"):
        return "red"
    if not row.timed:
        return "dim"
    return "bold" if row.provider.startswith("fused") else None
