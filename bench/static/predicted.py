"""Predictions of `roofline` for readers: the README's block `bench-static`, and a figure.

Both say first that nothing in them was measured. A bar is what a plan costs over the frozen layer, in per cent; plans
that launch the same kernels have bars of the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alora_kernels.plotting import BLUE, COLOURS, GREEN, ORANGE, figure, save, tidy

from ..report.figures import bar, legend
from ..report.readme import markdown
from ..report.rows import grouped
from .roofline import Prediction, Rates

COLORS = {"one_pass": BLUE, "two_launch": GREEN, "base_first": ORANGE, "low_rank_first": COLOURS[4]}
ROWS = (8192, 64)  # of a layer in the README: training, and the largest decoding batch
DECODING = 64  # rows up to which a layer counts as decoding


def block(rows: Sequence[Prediction], rates: Rates, link: str) -> str:
    """Time over the frozen layer by plan, as Markdown; `link` is the PNG, as the README links it."""
    head = f"PREDICTED, not measured: time over the frozen layer's (R = 16, E = 8, bf16; {rates.tflops:g} TFLOP/s,"
    head += f" {rates.tbps:g} TB/s, {rates.launch_us:g} µs a launch; our products at {rates.ours:g} of cuBLAS's speed)"
    lines = []
    for same in grouped([row for row in rows if row.layer.m in ROWS], lambda row: (row.layer, row.direction)):
        ratios = {plan: f"{row.ratio:.3f}" for row in same for plan in row.plan.split(", ")}
        first = same[0]
        lines.append([first.layer.routing, first.layer.shape, first.direction, *(ratios.get(p, "") for p in COLORS)])
    table = markdown(["routing", "M x K -> N", "pass"], [f"`{plan}`" for plan in COLORS], lines)
    foot = f"Figure: [predicted]({link}); all launches: `python -m bench static --roofline-only`."
    return "\n".join([head, "", *table, "", foot])


def draw(rows: Sequence[Prediction], path: Path, rates: Rates) -> None:
    """A column per routing; a panel each for forward, backward and decoding."""
    kinds: dict[str, dict[str, list[Prediction]]] = {}
    for row in rows:
        kind = "decoding (forward)" if row.layer.m <= DECODING else row.direction
        kinds.setdefault(kind, {}).setdefault(row.layer.routing, []).append(row)
    routings = list(dict.fromkeys(row.layer.routing for row in rows))
    heights = [max(len({p.layer for p in same}) for same in panels.values()) for panels in kinds.values()]
    made = figure(6.6 * len(routings), 1.4 + 0.85 * sum(heights) + 0.5 * len(kinds))
    axes = made.subplots(len(kinds), len(routings), squeeze=False, gridspec_kw={"height_ratios": heights})
    for across, (kind, panels) in zip(axes, kinds.items(), strict=True):
        highest = max(p.ratio for same in panels.values() for p in same)
        for axis, routing in zip(across, routings, strict=True):
            _panel(axis, f"{routing} routing, {kind}", panels.get(routing, []), highest)
    title = "PREDICTED, not measured: time over the frozen layer, R = 16, E = 8, bf16"
    legend(made, COLORS, title=title, title_fontsize=12)
    assumed = f"assumed {rates.tflops:g} TFLOP/s, {rates.tbps:g} TB/s, {rates.launch_us:g} µs a launch"
    made.supxlabel(f"{assumed}; our products at {rates.ours:g} of torch's speed; `python -m bench static`", fontsize=8)
    save(made, path)


def _panel(axis: Any, title: str, rows: Sequence[Prediction], highest: float) -> None:
    """Bars per shape, one for each plan that takes it, in the order of the legend."""
    shapes, thick = grouped(rows, lambda row: row.layer), 0.8 / len(COLORS)
    for place, same in enumerate(shapes):
        plans = {plan: row for row in same for plan in row.plan.split(", ")}
        for index, (plan, color) in enumerate(COLORS.items()):
            if (row := plans.get(plan)) is not None:
                over, usual = 100 * (row.ratio - 1), " (the default)" if row.default else ""
                y = place + thick * (index - (len(COLORS) - 1) / 2)
                bar(axis, y, over, thick * 0.9, f"{over:.1f} %{usual}", color)
    axis.set_yticks(range(len(shapes)), [f"{same[0].layer.shape}\nfrozen {same[0].frozen:,.0f} µs" for same in shapes])
    axis.invert_yaxis()
    axis.set_xlim(0, 125 * (highest - 1))  # room for the numbers
    axis.set_xlabel("% over the frozen layer, predicted", fontsize=8)
    axis.set_title(title, fontsize=10)
    tidy(axis)
