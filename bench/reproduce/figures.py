"""The experiments' figures: lines over layers, dots over methods.

A line is the mean over the linear layers of a block and over the seeds; its band is one standard deviation over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alora_kernels import plotting
from alora_kernels.plotting import BLUE, DARK_GREY, GREEN, ORANGE, RED

from .numbers import Number, per_seed, pick


@dataclass(frozen=True)
class Panel:
    """One pair of axes: series by name, in the order of the colours; `top`, where the scale ends, e.g. of a cosine."""

    title: str
    series: Mapping[str, Sequence[Number]]
    top: float | None = None


def by_layer(panels: Sequence[Panel], path: Path, *, columns: int) -> None:
    """A line per series over the blocks of the model, chance dashed where it is known; panels row by row."""
    figure, axes = plotting.panels(len(panels), columns)
    for axis, panel in zip(axes, panels, strict=True):
        for colour, (name, rows) in zip((BLUE, RED, GREEN, ORANGE), panel.series.items(), strict=False):
            _line(axis, name, rows, colour)
        _chance(axis, panel)
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel("block", fontsize=8)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]), top=panel.top)
        axis.set_xticks(sorted({row.layer for rows in panel.series.values() for row in rows}))
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    plotting.save(figure, path)


def _line(axis: Any, name: str, rows: Sequence[Number], colour: str) -> None:
    layers = sorted({row.layer for row in rows if row.value is not None})
    if not layers:
        return
    seeds = [per_seed(rows, layer=layer) for layer in layers]
    means = [statistics.fmean(values) for values in seeds]
    widths = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in seeds]
    axis.plot(layers, means, marker="o", ms=3, color=colour, label=name)
    low, high = ([m + s * w for m, w in zip(means, widths, strict=True)] for s in (-1, 1))
    axis.fill_between(layers, low, high, color=colour, alpha=0.2, lw=0)


def _chance(axis: Any, panel: Panel) -> None:
    """Its level, once where it is that of several series."""
    drawn: list[list[float]] = []
    for name, rows in panel.series.items():
        known = [row for row in rows if row.chance is not None]
        layers = sorted({row.layer for row in known})
        level = [round(statistics.fmean(row.chance or 0.0 for row in pick(known, layer=i)), 6) for i in layers]
        if level and level not in drawn:
            label = f"chance, {name}" if drawn else "chance"
            axis.plot(layers, level, ls="--", lw=1, color=DARK_GREY, label=label)
            drawn.append(level)


def accuracies(rows: Sequence[Number], path: Path, methods: Mapping[str, str], who: str) -> None:
    """Dots of average and worst ("task" or "client") accuracy, a line per method (case -> name), a bar at the mean."""
    figure, axes = plotting.panels(2, 2)
    titles = {"average": "average accuracy, %", "worst": f"accuracy of the worst {who}, %"}
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for y, case in enumerate(methods):
            values = [100 * value for value in per_seed(rows, case=case, measure=measure)]
            axis.plot(values, [y] * len(values), "o", ms=4, color=BLUE, alpha=0.7)
            if values:
                axis.plot([statistics.fmean(values)], [y], "|", ms=16, mew=2, color=RED)
        axis.set_yticks(range(len(methods)), list(methods.values()))
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    plotting.save(figure, path)
