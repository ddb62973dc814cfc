"""Predictions as a figure: what each plan adds to the frozen layer, if the roofline is all that counts.

In:   predictions of `bench.static.roofline`.
Out:  a PNG file; every panel says that nothing in it was measured.
Who:  `bench.report.plot`, or `plot_roofline(list(predict_all(Rates())), path)`. Needs matplotlib.

A bar per plan: what it costs over the frozen layer, in per cent; the time of the frozen layer stands beside each shape.
Plans that launch the same kernels have bars of the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .roofline import Prediction, Rates

COLORS = {"one_pass": "#1f6fb4", "two_launch": "#2e8b57", "base_first": "#e08a1e", "low_rank_first": "#9a6bb0"}
DPI = 130
DECODING = 64  # rows up to which a layer counts as decoding


def plot_roofline(rows: Sequence[Prediction], path: Path, rates: Rates | None = None) -> None:
    """A column per routing; a panel each for forward, backward and decoding.

    Args:
        rows: as `predict_all` gave them.
        path: of the PNG.
        rates: what was assumed; the usual ones if None.
    """
    panels: dict[tuple[str, str], list[Prediction]] = {}
    for row in rows:
        kind = "decoding (forward)" if row.layer.m <= DECODING else row.direction
        panels.setdefault((kind, row.layer.routing), []).append(row)
    kinds = list(dict.fromkeys(kind for kind, _ in panels))
    routings = list(dict.fromkeys(routing for _, routing in panels))
    heights = [max(len(_shapes(panels[kind, r])) for r in routings if (kind, r) in panels) for kind in kinds]
    size = (6.6 * len(routings), 1.4 + 0.85 * sum(heights) + 0.5 * len(kinds))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(kinds), len(routings), squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, kind in enumerate(kinds):
        highest = max(p.ratio for routing in routings for p in panels.get((kind, routing), []))
        for column, routing in enumerate(routings):
            _panel(axes[line][column], f"{routing} routing, {kind}", panels.get((kind, routing), []), highest)
    legend = [Patch(color=color, label=plan) for plan, color in COLORS.items()]
    title = "PREDICTED, not measured: time over the frozen layer, R = 16, E = 8, bf16"
    options = {"ncols": len(legend), "frameon": False, "fontsize": 9, "title_fontsize": 12}
    figure.legend(handles=legend, title=title, loc="outside upper center", **options)
    r = rates or Rates()
    assumed = f"assumed {r.tflops:g} TFLOP/s, {r.tbps:g} TB/s, {r.launch_us:g} µs a launch"
    figure.supxlabel(f"{assumed}; our products at {r.ours:g} of torch's speed; `python -m bench static`", fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))  # without pyplot: no global state, no display


def _shapes(rows: Sequence[Prediction]) -> list[str]:
    return list(dict.fromkeys(row.layer.shape for row in rows))


def _panel(axis: Any, title: str, rows: Sequence[Prediction], highest: float) -> None:
    """Bars per shape, one for each plan that takes it, in the order of the legend."""
    shapes, thick, labels = _shapes(rows), 0.8 / len(COLORS), []
    for place, shape in enumerate(shapes):
        same = [row for row in rows if row.layer.shape == shape]
        labels.append(f"{shape}\nfrozen {same[0].frozen:,.0f} µs")
        for index, (plan, color) in enumerate(COLORS.items()):
            row = next((row for row in same if plan in row.plan.split(", ")), None)
            if row is None:
                continue
            over, y = 100 * (row.ratio - 1), place + thick * (index - (len(COLORS) - 1) / 2)
            axis.barh(y, over, thick * 0.9, color=color)
            usual = " (the default)" if row.default else ""
            axis.annotate(f"{over:.1f} %{usual}", (over, y), xytext=(3, -3), textcoords="offset points", fontsize=7)
    axis.set_yticks(range(len(shapes)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 125 * (highest - 1))  # room for the numbers
    axis.set_xlabel("% over the frozen layer, predicted", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
