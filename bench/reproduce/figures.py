"""The experiments' figures: lines over layers, dots over methods.

In:   rows of a CSV.
Out:  PNG files.
Who:  the experiments. The only file here that needs matplotlib.

A line is the mean over the linear layers of a block and over the seeds; its band is one standard deviation over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import Row

COLOURS = ("#1f6fb4", "#c8382e", "#2e8b57", "#6b6b6b")
DPI = 130


@dataclass(frozen=True)
class Panel:
    """One pair of axes: series by name, in the order of the colours; `top`, where the scale ends, e.g. of a cosine."""

    title: str
    series: Mapping[str, Sequence[Row]]
    top: float | None = None


def by_layer(panels: Sequence[Panel], path: Path, *, columns: int) -> None:
    """A line per series over the blocks of the model, dashed where chance is known.

    Args:
        panels: row by row.
        path: of the PNG.
        columns: panels beside each other.
    """
    figure, axes = _figure(len(panels), columns)
    for axis, panel in zip(axes, panels, strict=False):
        for colour, (name, rows) in zip(COLOURS, panel.series.items(), strict=False):
            _line(axis, name, rows, colour)
        _chance(axis, panel)
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel("block", fontsize=8)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]), top=panel.top)
        axis.set_xticks(sorted({row.layer for rows in panel.series.values() for row in rows}))
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _line(axis: Any, name: str, rows: Sequence[Row], colour: str) -> None:
    found: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        if row.value is not None:
            found.setdefault(row.layer, {}).setdefault(row.seed, []).append(row.value)
    if not found:
        return
    layers = sorted(found)
    seeds = [[statistics.fmean(values) for values in found[layer].values()] for layer in layers]
    means = [statistics.fmean(values) for values in seeds]
    widths = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in seeds]
    axis.plot(layers, means, marker="o", ms=3, color=colour, label=name)
    low, high = ([m + s * w for m, w in zip(means, widths, strict=True)] for s in (-1, 1))
    axis.fill_between(layers, low, high, color=colour, alpha=0.2, lw=0)


def _chance(axis: Any, panel: Panel) -> None:
    """Its level, once where it is that of several series."""
    drawn: list[list[float]] = []
    for name, rows in panel.series.items():
        levels: dict[int, list[float]] = {}
        for row in rows:
            if row.chance is not None:
                levels.setdefault(row.layer, []).append(row.chance)
        line = [round(statistics.fmean(levels[layer]), 6) for layer in sorted(levels)]
        if line and line not in drawn:
            label = f"chance, {name}" if drawn else "chance"
            axis.plot(sorted(levels), line, ls="--", lw=1, color=COLOURS[3], label=label)
            drawn.append(line)


def dots(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A line of dots per method, one per seed, and a bar at their mean.

    Args:
        panels: title -> method -> values.
        path: of the PNG.
    """
    figure, axes = _figure(len(panels), len(panels))
    for axis, (title, methods) in zip(axes, panels.items(), strict=True):
        for y, values in enumerate(methods.values()):
            axis.plot(values, [y] * len(values), "o", ms=4, color=COLOURS[0], alpha=0.7)
            if values:
                axis.plot([statistics.fmean(values)], [y], "|", ms=16, mew=2, color=COLOURS[1])
        axis.set_yticks(range(len(methods)), list(methods), fontsize=8)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _figure(count: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
