"""The figure of `bench serving`: throughput against the number of tasks, and how long the first token takes.

In:   the rows of one run.
Out:  a PNG.
Who:  `bench.serving.command`, at the end of a run; `python -m bench.serving.figure CSV [PNG]` draws a CSV's newest
      run again.

Left: tokens per second, a line per popularity, the alternatives beside it, all values labelled. Right: first token, p50
as a bar and p95 as a line beyond it, at the number of tasks where all providers are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator

from ..report.figures import BLUE, DARK, DPI, GREEN, GREY, RED
from ..report.sheet import read
from .load import POPULARITIES
from .rows import BASE, MERGED, MIXED, OURS, PROVIDERS, SERIAL, Row, medians, newest

COLORS = {OURS: BLUE, BASE: GREY, SERIAL: RED, MERGED: "#e08a2e", MIXED: GREEN}
STYLES = {"uniform": ("o", "-"), "zipf": ("s", "--"), "identical": ("^", ":")}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the medians of a run's rows.

    Args:
        rows: of one run.
        path: of the PNG.
    """
    timed = [row for row in medians(rows).values() if row.tokens_per_second is not None]
    figure = Figure(figsize=(13, 5.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _throughput(left, timed)
    _first_token(right, timed)
    one = timed[0]
    figure.suptitle(
        f"{one.model} {one.dtype}, adapters of rank {one.r} on all linear layers, {one.concurrency} requests in "
        f"flight, {one.new_tokens} new tokens each",
        fontsize=11,
    )
    versions = f"torch {one.torch}, transformers {one.transformers}, peft {one.peft}, commit {one.commit}, {one.date}"
    figure.supxlabel(f"{one.device}, {versions}; medians of the repeats", fontsize=7, color=DARK)
    FigureCanvasAgg(figure).print_png(str(path))


def _throughput(axis: Any, rows: Sequence[Row]) -> None:
    """Lines over the number of tasks; the base alone has none, and is a level."""
    for popularity in POPULARITIES:
        mine = sorted((r for r in rows if r.provider == OURS and _on_line(r, popularity)), key=lambda r: r.tasks)
        marker, dashes = STYLES[popularity]
        if [row for row in mine if row.popularity == popularity]:
            _line(axis, mine, f"{OURS}: {popularity}", BLUE, marker, dashes, labels=popularity == "uniform")
    for name in (SERIAL, MERGED, MIXED):
        if same := sorted((row for row in rows if row.provider == name), key=lambda row: row.tasks):
            _line(axis, same, name, COLORS[name], "D", "-", labels=True)
    for row in (row for row in rows if row.provider == BASE):
        level = row.tokens_per_second
        axis.axhline(level, color=DARK, linewidth=1, linestyle=(0, (1, 2)), label=f"{BASE}: {level:.0f}")
    ticks = sorted({row.tasks for row in rows if row.provider != BASE})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(0, 1.12 * max(row.tokens_per_second or 0 for row in rows))
    axis.set_xlabel("tasks")
    axis.set_title("generated tokens per second", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    axis.spines[["top", "right"]].set_visible(False)


def _on_line(row: Row, popularity: str) -> bool:
    """Over one task all popularities are the same and only one is measured."""
    return row.popularity == popularity or row.tasks == 1


def _line(
    axis: Any, rows: Sequence[Row], label: str, color: str, marker: str, dashes: str, *, labels: bool = False
) -> None:
    tasks, speeds = [row.tasks for row in rows], [row.tokens_per_second or 0.0 for row in rows]
    alpha = 1.0 if labels else 0.55
    axis.plot(tasks, speeds, marker=marker, linestyle=dashes, color=color, label=label, markersize=5, alpha=alpha)
    place = (0, -14) if label in (MERGED, MIXED) else (0, 6)  # two numbers at one place must not cover each other
    for x, y in zip(tasks, speeds, strict=True) if labels else ():
        text = axis.annotate(f"{y:.0f}", (x, y), xytext=place, textcoords="offset points", fontsize=8, color=color)
        text.set(ha="center", path_effects=[withStroke(linewidth=2.5, foreground="white")])


def _first_token(axis: Any, rows: Sequence[Row]) -> None:
    """Bars at the number of tasks that most providers have."""
    uniform = [row for row in rows if row.popularity == "uniform"]
    counts = {
        tasks: len({row.provider for row in uniform if row.tasks == tasks}) for tasks in {r.tasks for r in uniform}
    }
    if not counts:
        axis.set_axis_off()
        return
    target = max(counts, key=lambda tasks: counts[tasks])
    shown = {row.provider: row for row in uniform if row.tasks == target}
    names = [name for name in reversed(PROVIDERS) if name in shown]
    widest = max(shown[name].first_p95_ms or 0.0 for name in names)
    for place, name in enumerate(names):
        row = shown[name]
        p50, p95 = row.first_p50_ms or 0.0, row.first_p95_ms or 0.0
        axis.barh(place, p50, 0.6, color=COLORS[name])
        axis.plot([p50, p95], [place, place], color="black", linewidth=1.2)
        axis.plot([p95], [place], "|", color="black", markersize=10)
        axis.annotate(f"{p50:.0f} / {p95:.0f} ms", (p95, place), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_xlim(0, 1.35 * widest)
    axis.set_xlabel("ms from a request's arrival")
    axis.set_title(f"first token, p50 (bar) and p95 (line); uniform over {target} tasks", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(newest(read(source, Row)), Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png"))
