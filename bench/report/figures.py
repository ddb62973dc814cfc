"""Rows as figures: times per case, and how far the targets are.

In:   the newest rows of one CSV.
Out:  PNG files.
Who:  `bench.report.plot`, which names them. The only file that needs matplotlib.

Every case that was timed is shown, those that the fused op loses too: an alternative of comparable reach (several
adapters) that is faster is drawn in red. One LoRA and the frozen layer do less and are drawn in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .rows import GRAPH, Row
from .tables import shown_ms
from .targets import FUSED, Verdict

BLUE, RED, GREY, DARK, GREEN = "#1f6fb4", "#c8382e", "#c4c4c4", "#6b6b6b", "#2e8b57"
LESS = ("frozen", "lora")  # functions of fewer adapters than the case has
DPI = 130


def provenance(rows: Sequence[Row]) -> str:
    """Device, versions, commit and date of what is shown; several runs are all named."""
    runs = dict.fromkeys((row.device, row.torch, row.triton, row.commit, row.date) for row in rows)
    return "; ".join(f"{run[0]}, torch {run[1]}, triton {run[2]}, commit {run[3]}, {run[4]}" for run in runs)


def times(rows: Sequence[Row], path: Path) -> None:
    """A panel per case and pass, a bar per provider: p50, with p20 to p80 as a line.

    Args:
        rows: of cases that belong together.
        path: of the PNG.
    """
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.timed:
            panels.setdefault((row.case, row.direction), []).append(row)
    columns = min(2, len(panels))
    sizes = [len({row.provider for row in same}) + 2 for same in panels.values()]  # 2: title and axis
    ratios = [max(sizes[i : i + columns]) for i in range(0, len(sizes), columns)]
    figure = Figure(figsize=(7.2 * columns, 0.9 + 0.3 * sum(ratios) + 0.3 * len(ratios)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(ratios), columns, squeeze=False, gridspec_kw={"height_ratios": ratios}).flatten()
    for axis, ((case, direction), same) in zip(axes, panels.items(), strict=False):
        _panel(axis, f"{case}, {direction}", same)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    shown = {
        BLUE: "fused",
        RED: "faster than fused",
        DARK: "slower than fused",
        GREY: "does less: no adapter or one",
    }
    legend = [Patch(color=color, label=label) for color, label in shown.items()]
    if any(row.mode == GRAPH for row in rows):
        legend.append(Patch(facecolor="white", edgecolor=DARK, label="pale: eager; full: CUDA graph"))
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False, fontsize=9)
    _finish(figure, rows, path)


def targets(verdicts: Sequence[Verdict], rows: Sequence[Row], path: Path) -> None:
    """How far each target is from what must be: beyond 1 it is met."""
    known = [v for v in verdicts if v.measured is not None and v.target.must is not None]
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(known)), dpi=DPI, layout="constrained")
    axis: Any = figure.subplots()
    for line, verdict in enumerate(reversed(known)):
        t, measured = verdict.target, verdict.measured or 0.0
        must = t.must or 1.0
        margin = must / measured if t.at_most else measured / must
        color = GREEN if verdict.met else RED
        axis.plot([1, margin], [line, line], color=color, linewidth=2)
        axis.plot([margin], [line], "o", color=color)
        text = f"{measured:.2f} ({'≤' if t.at_most else '≥'} {must:.2f})"
        axis.annotate(text, (max(margin, 1), line), xytext=(8, -3), textcoords="offset points", fontsize=8, color=color)
    names = [f"{v.target.case}, {v.target.direction}: {v.target.ratio_of}" for v in reversed(known)]
    axis.set_yticks(range(len(known)), names, fontsize=8)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** 0.2)  # room for the numbers
    ticks = [t for t in (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10) if low <= t <= high * 1.2]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("margin over what must be: right of 1 is met (green), left is missed (red)", fontsize=9)
    axis.set_title("targets: measured ratio of p50 (or peak memory), in brackets what it must be", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    _finish(figure, rows, path)


def _panel(axis: Any, title: str, rows: Sequence[Row]) -> None:
    """One case and pass: bars sorted by the time under a CUDA graph where there is one."""
    modes = sorted({row.mode for row in rows}, key=lambda mode: mode != GRAPH)
    by_provider: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_provider.setdefault(row.provider, {})[row.mode] = row
    modes_of = {name: [found[mode] for mode in modes if mode in found] for name, found in by_provider.items()}
    order = sorted(by_provider, key=lambda name: _p50(modes_of[name][0]), reverse=True)
    thick = 0.8 / len(modes)
    widest = max(_p50(row) for row in rows)
    for place, name in enumerate(order):
        for index, mode in enumerate(modes):
            if mode not in by_provider[name]:
                continue
            row = by_provider[name][mode]
            y = place - thick * (index - (len(modes) - 1) / 2)
            fused = by_provider.get(FUSED, {}).get(mode)
            axis.barh(y, _p50(row), thick * 0.92, color=_color(row, fused), alpha=1.0 if index == 0 else 0.45)
            end = min(max(_p50(row), row.p80_ms or 0.0), 1.25 * widest)  # a wild p80 must not flatten all bars
            axis.plot([row.p20_ms, end], [y, y], color="black", linewidth=1)
            if end < (row.p80_ms or 0.0):
                axis.plot([end], [y], ">", color="black", markersize=4)
            ratio = f"  {_p50(row) / _p50(fused):.2f}x" if fused else ""
            text = f"{shown_ms(row.p50_ms)} ms{ratio}"
            axis.annotate(text, (end, y), xytext=(4, -3), textcoords="offset points", fontsize=7.5)
    axis.set_yticks(range(len(order)), [f"{name} [{modes_of[name][0].computes}]" for name in order], fontsize=8)
    axis.set_xlim(0, widest * 1.6)
    axis.tick_params(axis="x", labelsize=8)
    first = rows[0]
    sizes = " ".join(f"{letter.upper()}={getattr(first, letter)}" for letter in "mknre")
    axis.set_title(f"{title}\n{sizes} {first.dtype}", fontsize=9)
    ratio = "; x: times as long as fused" if FUSED in by_provider else ""
    axis.set_xlabel(f"ms, p50 and p20 to p80{ratio}", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _color(row: Row, fused: Row | None) -> str:
    if row.provider.startswith(FUSED):
        return BLUE
    if row.computes in LESS:
        return GREY
    return RED if fused is not None and _p50(row) < _p50(fused) else DARK


def _p50(row: Row) -> float:
    assert row.p50_ms is not None
    return row.p50_ms


def _finish(figure: Figure, rows: Sequence[Row], path: Path) -> None:
    figure.supxlabel(provenance([row for row in rows if row.timed]), fontsize=7, color=DARK)
    FigureCanvasAgg(figure).print_png(str(path))  # without pyplot: no global state, no display
