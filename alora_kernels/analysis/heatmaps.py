"""Heat maps: how alike units are, over all modules and layer by layer.

In:   an `Analysis` with at least two units.
Out:  `Plan`s: one figure of all means, and one per part and measure with a panel per layer.
Who:  `figures.pictures`.

Colours begin at zero. Over all modules they reach 0.1 at least, so that what is near nothing looks like nothing; layer
by layer they end at the largest value, so that layers can be told apart. A dotted line in the scale is the level of
chance. The diagonal, each unit with itself, is left empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .labels import CHANCE_OF, NAMES
from .names import clipped
from .plan import Plan
from .table import Row, mean_of, measures, square, where

if TYPE_CHECKING:
    from .result import Analysis

Table = NDArray[np.float64]
Key = tuple[str, str]  # part and measure
NUMBERED = 14  # units up to which cells hold numbers
WIDE = 22  # characters of a label
FLOOR, FLOOR_LAYERS = 0.1, 0.02  # least range of colours
EDGE, BAR, TITLE = 0.06, 0.95, 0.28  # inches around small panels, for the scale, above each panel


def plans(analysis: Analysis) -> Iterator[Plan]:
    """The mean over modules, then the layers."""
    found = measures(analysis.similarity)
    labels = [label for label in analysis.labels if any(label in (r.unit1, r.unit2) for r in analysis.similarity)]
    if not found:
        return
    tables = {key: square(where(analysis.similarity, *key), labels) for key in found}
    yield _overview(tables, labels, {key: _chance(where(analysis.similarity, *key)) for key in found})
    for key in found:
        rows = where(analysis.similarity, *key)
        layers = sorted({row.layer for row in rows if row.layer is not None and not math.isnan(row.value)})
        if len(layers) > 1:
            by_layer = {n: square([r for r in rows if r.layer == n], labels) for n in layers}
            yield _layers(key, by_layer, labels, _chance(rows))


def _chance(rows: list[Row]) -> float:
    """The mean level of chance; NaN where it is zero."""
    return mean_of(row.chance for row in rows if row.chance is not None).mean


def _overview(tables: dict[Key, Table], labels: list[str], chances: dict[Key, float]) -> Plan:
    n = len(labels)
    columns = 2 if len(tables) > 1 else 1
    lines = math.ceil(len(tables) / columns)
    side = min(max(2.3, 0.52 * n + 1.0), 6.4)
    size = (columns * (side + 1.5), lines * (side + 0.7))
    said = "; ".join(f"{NAMES[key]}: {_extremes(table, labels)}" for key, table in tables.items())
    levels = [f"{NAMES[key]} {value:.3f}" for key, value in chances.items() if not math.isnan(value)]
    caption = "Mean over all modules where both can be compared; empty where none can." + (
        f" Random matrices would reach, dotted in the scale: {', '.join(levels)}." if levels else ""
    )
    paint = partial(_paint_overview, tables=tables, labels=labels, chances=chances, grid=(lines, columns))
    return Plan("similarity", "How alike, over all modules", caption, f"Heat maps of pairs. {said}.", size, paint)


def _extremes(table: Table, labels: list[str]) -> str:
    """The highest and the lowest pair, in words."""
    above = np.where(np.triu(np.ones_like(table), 1) > 0, table, np.nan)
    if np.isnan(above).all():
        return "nothing compared"
    high, low = (np.unravel_index(int(f(above)), above.shape) for f in (np.nanargmax, np.nanargmin))
    text = f"highest {labels[high[0]]} with {labels[high[1]]}, {above[high]:.3f}"
    return text if high == low else f"{text}; lowest {labels[low[0]]} with {labels[low[1]]}, {above[low]:.3f}"


def _paint_overview(
    figure: Any,
    theme: dict[str, str],
    *,
    tables: dict[Key, Table],
    labels: list[str],
    chances: dict[Key, float],
    grid: tuple[int, int],
) -> None:
    cells = figure.subplots(*grid, squeeze=False).flatten()
    short = [clipped(label, WIDE) for label in labels]
    for axes, (key, table) in zip(cells, tables.items()):
        limits = _limits([table], key, FLOOR)
        image = _cells(axes, table, limits, key, theme)
        axes.set_title(NAMES[key], fontsize=10)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(range(len(labels)), short, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(labels)), short, fontsize=8)
        _scale(figure.colorbar(image, ax=axes, shrink=0.8, aspect=24, pad=0.02), chances[key], theme)
        if len(labels) <= NUMBERED:
            n = len(labels)
            _numbers(axes, table, image, Cells(), 9 if n <= 5 else 7.5 if n <= 8 else 6, 3 if n <= 8 else 2)
    for axes in cells[len(tables) :]:
        axes.set_axis_off()


def _layers(key: Key, tables: dict[int, Table], labels: list[str], chance: float) -> Plan:
    columns = min(6 if len(labels) <= 8 else 4, len(tables))
    lines = math.ceil(len(tables) / columns)
    side = 9.6 / max(columns, 3)
    size = (side * columns + BAR, lines * (side + TITLE) - EDGE)
    ends = {n: mean_of(table[np.triu_indices(len(labels), 1)]).mean for n, table in tables.items()}
    known = {n: value for n, value in ends.items() if not math.isnan(value)}
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    order = ", ".join(clipped(label, WIDE) for label in labels)
    caption = (
        "A panel per layer, mean over its modules; colours end at the largest value of all panels. From top to bottom"
        f" and from left to right: {order}."
    )
    alt = (
        f"{len(tables)} small heat maps of {NAMES[key]}, one per layer. Mean over pairs: lowest in layer {low},"
        f" {known[low]:.3f}; highest in layer {high}, {known[high]:.3f}."
    )
    title = f"{NAMES[key][0].upper()}{NAMES[key][1:]}, layer by layer"
    paint = partial(_paint_layers, tables=tables, key=key, chance=chance, grid=(lines, columns), size=size)
    return Plan("-".join(("layers", *key)), title, caption, alt, size, paint, layout=None)


def _paint_layers(
    figure: Any,
    theme: dict[str, str],
    *,
    tables: dict[int, Table],
    key: Key,
    chance: float,
    grid: tuple[int, int],
    size: tuple[float, float],
) -> None:
    """One set of axes in inches holds all panels: 30 with ticks of their own take seconds."""
    (lines, columns), (wide, tall) = grid, size
    cell, row = (wide - BAR) / columns, (tall + EDGE) / lines
    side = cell - EDGE
    limits = _limits(list(tables.values()), key, FLOOR_LAYERS)
    axes = figure.add_axes((0, 0, 1, 1))
    for number, (layer, table) in enumerate(tables.items()):
        left, top = number % columns * cell + EDGE, tall - number // columns * row - TITLE
        image = _cells(axes, table, limits, key, theme, extent=(left, left + side, top - side, top))
        axes.text(left + side / 2, top + 0.05, f"layer {layer}", ha="center", fontsize=9)
        if len(table) <= 5:
            step = side / len(table)
            cells = Cells(left + step / 2, top - step / 2, step, -step)
            _numbers(axes, table, image, cells, 8 if len(table) <= 3 else 7, 3 if limits[1] < 0.1 else 2)
    axes.set(xlim=(0, wide), ylim=(0, tall), aspect="auto")
    axes.set_axis_off()
    height = min(tall - 2 * TITLE, 4.5)
    bar = ((wide - BAR + 0.18) / wide, (tall - TITLE - height) / tall, 0.14 / wide, height / tall)
    _scale(figure.colorbar(image, cax=figure.add_axes(bar)), chance, theme)


def _limits(tables: list[Table], key: Key, floor: float) -> tuple[float, float]:
    known = np.concatenate([table[~np.isnan(table)] for table in tables])
    top = max(floor, float(np.abs(known).max())) if known.size else 1.0
    return (-top if key[1] not in CHANCE_OF else 0.0), top


class Cells(NamedTuple):
    """Where the first cell's middle is, and how far it is to the next."""

    x: float = 0.0
    y: float = 0.0
    dx: float = 1.0
    dy: float = 1.0


def _cells(axes: Any, table: Table, limits: tuple[float, float], key: Key, theme: dict[str, str], **place: Any) -> Any:
    from matplotlib import colormaps

    colours = colormaps["RdBu_r" if limits[0] < 0 else "viridis"].with_extremes(bad=theme["line"])
    return axes.imshow(np.ma.masked_invalid(table), cmap=colours, vmin=limits[0], vmax=limits[1], **place)


def _numbers(axes: Any, table: Table, image: Any, cells: Cells, size: float, digits: int) -> None:
    """The value in each cell, black or white by how bright the cell is."""
    for (i, j), value in np.ndenumerate(table):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            text = f"{value:.{digits}f}".replace("0.", ".", 1)
            x, y = cells.x + j * cells.dx, cells.y + i * cells.dy
            axes.text(x, y, text, ha="center", va="center", fontsize=size, color="black" if bright else "white")


def _scale(bar: Any, chance: float, theme: dict[str, str]) -> None:
    """The colour scale, with the level of chance in it."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    if not math.isnan(chance):
        for colour, style in (("black", "-"), ("white", (0, (1, 1)))):  # seen on any colour
            bar.ax.axhline(chance, color=colour, linestyle=style, linewidth=1.6)
