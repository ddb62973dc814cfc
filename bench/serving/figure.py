"""The figure of `bench serving`; `python -m bench.serving.figure CSV [PNG]` draws a CSV's newest run again.

Left: tokens per second against the number of tasks, a line per popularity, the alternatives beside it, all values
labelled. Right: first token, p50 as a bar and p95 as a line beyond it, where all providers are compared.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alora_kernels.plotting import BLUE, DARK_GREY, GREEN, GREY, ORANGE, RED, figure, save, tidy

from ..report.figures import bar
from ..report.rows import newest
from ..report.sheet import read
from .load import POPULARITIES
from .rows import BASE, MERGED, MIXED, OURS, PROVIDERS, SERIAL, Repeat, medians

COLORS = {OURS: BLUE, BASE: GREY, SERIAL: RED, MERGED: ORANGE, MIXED: GREEN}
STYLES = {"uniform": "o-", "zipf": "s--", "identical": "^:"}


def plot(rows: Sequence[Repeat], path: Path) -> None:
    timed = [row for row in medians(rows) if row.timed]
    made = figure(13, 5.2)
    left, right = made.subplots(1, 2, width_ratios=(1.25, 1))
    _throughput(left, timed)
    _first_token(right, timed)
    one = timed[0]
    made.suptitle(
        f"{one.model} {one.dtype}, adapters of rank {one.r} on all linear layers, {one.concurrency} requests in "
        f"flight, {one.new_tokens} new tokens each",
        fontsize=11,
    )
    versions = f"torch {one.torch}, transformers {one.transformers}, peft {one.peft}, commit {one.commit}, {one.date}"
    made.supxlabel(f"{one.device}, {versions}; medians of the repeats", fontsize=7, color=DARK_GREY)
    save(made, path)


def _throughput(axis: Any, rows: Sequence[Repeat]) -> None:
    """Lines over the number of tasks; the base alone has none, and is a level."""
    for popularity in POPULARITIES:
        # over one task all popularities are the same and only one is measured
        mine = [row for row in rows if row.provider == OURS and (row.popularity == popularity or row.tasks == 1)]
        if any(row.popularity == popularity for row in mine):
            _line(axis, mine, f"{OURS}: {popularity}", BLUE, STYLES[popularity], labels=popularity == "uniform")
    for name in (SERIAL, MERGED, MIXED):
        if same := [row for row in rows if row.provider == name]:
            _line(axis, same, name, COLORS[name], "D-", labels=True)
    for row in (row for row in rows if row.provider == BASE):
        level = row.tokens_per_second
        axis.axhline(level, color=DARK_GREY, linewidth=1, linestyle=(0, (1, 2)), label=f"{BASE}: {level:.0f}")
    ticks = sorted({row.tasks for row in rows if row.provider != BASE})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(0, 1.12 * max(row.tokens_per_second or 0 for row in rows))
    axis.set_xlabel("tasks")
    axis.set_title("generated tokens per second", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    tidy(axis)


def _line(axis: Any, rows: Sequence[Repeat], label: str, color: str, style: str, *, labels: bool) -> None:
    from matplotlib.patheffects import withStroke

    points = sorted((row.tasks, row.tokens_per_second or 0.0) for row in rows)
    axis.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=5, alpha=1.0 if labels else 0.55)
    place = (0, -14) if label in (MERGED, MIXED) else (0, 6)  # two numbers at one place must not cover each other
    for x, y in points if labels else ():
        text = axis.annotate(f"{y:.0f}", (x, y), xytext=place, textcoords="offset points", fontsize=8, color=color)
        text.set(ha="center", path_effects=[withStroke(linewidth=2.5, foreground="white")])


def _first_token(axis: Any, rows: Sequence[Repeat]) -> None:
    """Bars at the number of tasks that most providers have."""
    uniform = [row for row in rows if row.popularity == "uniform"]
    if not uniform:
        axis.set_axis_off()
        return
    target = Counter(row.tasks for row in uniform).most_common(1)[0][0]
    shown = {row.provider: row for row in uniform if row.tasks == target}
    names = [name for name in reversed(PROVIDERS) if name in shown]
    for place, name in enumerate(names):
        p50, p95 = shown[name].first_p50_ms or 0.0, shown[name].first_p95_ms or 0.0
        axis.plot([p95], [place], "|", color="black", markersize=10)
        bar(axis, place, p50, 0.6, f"{p50:.0f} / {p95:.0f} ms", COLORS[name], to=(p50, p95))
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1.35 * max(shown[name].first_p95_ms or 0.0 for name in names))
    axis.set_xlabel("ms from a request's arrival")
    axis.set_title(f"first token, p50 (bar) and p95 (line); uniform over {target} tasks", fontsize=10)
    tidy(axis)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    plot(newest(read(source, Repeat), key=lambda row: ""), target)
