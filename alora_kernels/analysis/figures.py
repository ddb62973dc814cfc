"""Figures of an `Analysis` for `report`: heat maps of pairs, curves over the layers, gradient conflicts over the steps.

Colours of heat maps begin at zero. Over all modules they reach 0.1 at least, so that what is near nothing looks like
nothing; layer by layer they end at the largest value, so that layers can be told apart. The level of chance, where it
is not zero, is dotted: in the scale of a heat map, across a curve's panel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import plotting
from ..text import clipped
from .gradients import ConflictFile, Measured, share_of
from .table import Analysis, Mean, Row, mean_of, means, measures, named, origins, over_layers, places, square, where

DPI = 150  # 10 inches: 1500 pixels, twice the width of the page
REMEDY = "the figures need matplotlib: pip install matplotlib, or do without them (--no-figures, figures=False)"
NUMBERED = 14  # units up to which cells hold numbers
WIDE, LONG = 22, 26  # characters of a unit's label, of a line's name
FLOOR, FLOOR_LAYERS = 0.1, 0.02  # least range of colours
EDGE, BAR, TITLE = 0.06, 0.95, 0.28  # inches around small panels, for the scale, above each panel
DASHES = ("-", "--", ":", "-.")
MOST_BANDS = 3  # lines up to which the range is shaded
LEAST = 0.05  # range of an axis of cosines

Table = NDArray[np.float64]
Key = tuple[str, str]  # part and measure
Theme = dict[str, str]
Line = Mapping[int, Mean]
Looks = Mapping[str, tuple[str, str]]  # of a line: what its colour and its dashes stand for


@dataclass(frozen=True)
class Picture:
    """A figure that was drawn, for light and for dark surroundings; `width` in pixels of a page."""

    name: str
    title: str
    caption: str
    alt: str
    width: int
    light: bytes = field(repr=False)
    dark: bytes = field(repr=False)


def check_matplotlib() -> None:
    """Raise ImportError, naming the remedy, if it is missing."""
    plotting.check_matplotlib(REMEDY)


def pictures(analysis: Analysis) -> Iterator[Picture]:
    """All figures that the analysis has numbers for. Raises as `check_matplotlib`."""
    check_matplotlib()
    yield from _heat_maps(analysis)
    yield from _curves(analysis)
    yield from _conflicts(analysis)


def _picture(
    name: str, title: str, caption: str, alt: str, size: tuple[float, float], paint: Callable[[Any, Theme], None],
    layout: Literal["constrained"] | None = "constrained",
) -> Picture:  # fmt: skip
    """A figure of so many inches; `paint` uses the theme's colours, and places everything where there is no layout."""
    drawn = []
    for theme in (plotting.LIGHT, plotting.DARK):
        with plotting.themed(theme):
            figure = plotting.figure(*size, dpi=DPI, layout=layout)
            paint(figure, theme)
            drawn.append(plotting.png(figure))
    return Picture(name, title, caption, alt, round(100 * size[0]), *drawn)


def _heat_maps(analysis: Analysis) -> Iterator[Picture]:
    """The mean over modules, then the layers."""
    rows, keys = analysis.similarity, measures(analysis.similarity)
    compared = {unit for row in rows for unit in (row.unit1, row.unit2)}
    labels = [label for label in analysis.labels if label in compared]
    if not keys:
        return
    by_key = {key: where(rows, *key) for key in keys}
    chances = {key: mean_of(row.chance for row in found).mean for key, found in by_key.items()}
    yield _overview({key: square(found, labels) for key, found in by_key.items()}, labels, chances)
    for key, found in by_key.items():
        layers = sorted({row.layer for row in found if row.layer is not None and not math.isnan(row.value)})
        if len(layers) > 1:
            by_layer = {n: square([row for row in found if row.layer == n], labels) for n in layers}
            yield _layers(key, by_layer, labels, chances[key])


def _overview(tables: dict[Key, Table], labels: list[str], chances: dict[Key, float]) -> Picture:
    n, columns = len(labels), min(2, len(tables))
    side = min(max(2.3, 0.52 * n + 1.0), 6.4)
    said = "; ".join(f"{named(*key)}: {_extremes(table, labels)}" for key, table in tables.items())
    levels = [f"{named(*key)} {value:.3f}" for key, value in chances.items() if not math.isnan(value)]
    caption = "Mean over all modules where both can be compared; empty where none can." + (
        f" Random matrices would reach, dotted in the scale: {', '.join(levels)}." if levels else ""
    )
    short = [clipped(label, WIDE) for label in labels]

    def paint(figure: Any, theme: Theme) -> None:
        for axes, (key, table) in zip(plotting.grid(figure, len(tables), columns), tables.items()):
            image = _cells(axes, table, _limits([table], key, FLOOR), theme)
            axes.set_title(named(*key), fontsize=10)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.set_xticks(range(n), short, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
            axes.set_yticks(range(n), short, fontsize=8)
            _scale(figure.colorbar(image, ax=axes, shrink=0.8, aspect=24, pad=0.02), chances[key])
            if n <= NUMBERED:
                _numbers(axes, table, image, 9 if n <= 5 else 7.5 if n <= 8 else 6, 3 if n <= 8 else 2)

    size = (columns * (side + 1.5), math.ceil(len(tables) / columns) * (side + 0.7))
    return _picture("similarity", "How alike, over all modules", caption, f"Heat maps of pairs. {said}.", size, paint)


def _extremes(table: Table, labels: list[str]) -> str:
    """The highest and the lowest pair, in words."""
    above = np.where(np.triu(np.ones_like(table), 1) > 0, table, np.nan)
    high, low = (np.unravel_index(int(f(above)), above.shape) for f in (np.nanargmax, np.nanargmin))
    text = f"highest {labels[high[0]]} with {labels[high[1]]}, {above[high]:.3f}"
    return text if high == low else f"{text}; lowest {labels[low[0]]} with {labels[low[1]]}, {above[low]:.3f}"


def _layers(key: Key, tables: dict[int, Table], labels: list[str], chance: float) -> Picture:
    """A panel per layer, all in one set of axes that counts inches: 30 with ticks of their own take seconds."""
    columns = min(6 if len(labels) <= 8 else 4, len(tables))
    cell = 9.6 / max(columns, 3)
    wide, tall = cell * columns + BAR, math.ceil(len(tables) / columns) * (cell + TITLE) - EDGE
    limits, side = _limits(list(tables.values()), key, FLOOR_LAYERS), cell - EDGE
    ends = {n: mean_of(table[np.triu_indices(len(labels), 1)]).mean for n, table in tables.items()}
    low, high = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    caption = (
        "A panel per layer, mean over its modules; colours end at the largest value of all panels. From top to bottom"
        f" and from left to right: {', '.join(clipped(label, WIDE) for label in labels)}."
    )
    alt = (
        f"{len(tables)} small heat maps of {named(*key)}, one per layer. Mean over pairs: lowest in layer {low},"
        f" {ends[low]:.3f}; highest in layer {high}, {ends[high]:.3f}."
    )
    title = f"{named(*key)[0].upper()}{named(*key)[1:]}, layer by layer"

    def paint(figure: Any, theme: Theme) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        for place, (layer, table) in enumerate(tables.items()):
            left, top = place % columns * cell + EDGE, tall - place // columns * (cell + TITLE) - TITLE
            image = _cells(axes, table, limits, theme, extent=(left, left + side, top - side, top))
            axes.text(left + side / 2, top + 0.05, f"layer {layer}", ha="center", fontsize=9)
            if len(table) <= 5:
                _numbers(axes, table, image, 8 if len(table) <= 3 else 7, 3 if limits[1] < 0.1 else 2)
        axes.set(xlim=(0, wide), ylim=(0, tall), aspect="auto")
        axes.set_axis_off()
        height = min(tall - 2 * TITLE, 4.5)
        bar = ((wide - BAR + 0.18) / wide, (tall - TITLE - height) / tall, 0.14 / wide, height / tall)
        _scale(figure.colorbar(image, cax=figure.add_axes(bar)), chance)

    return _picture("-".join(("layers", *key)), title, caption, alt, (wide, tall), paint, layout=None)


def _limits(tables: list[Table], key: Key, floor: float) -> tuple[float, float]:
    top = max(floor, *(float(np.nanmax(np.abs(table))) for table in tables))
    return (0.0 if key[1] == "overlap" else -top), top


def _cells(axes: Any, table: Table, limits: tuple[float, float], theme: Theme, **place: Any) -> Any:
    from matplotlib import colormaps

    colours = colormaps["RdBu_r" if limits[0] < 0 else "viridis"].with_extremes(bad=theme["line"])
    return axes.imshow(np.ma.masked_invalid(table), cmap=colours, vmin=limits[0], vmax=limits[1], **place)


def _numbers(axes: Any, table: Table, image: Any, size: float, digits: int) -> None:
    """The value in each cell, black or white by how bright the cell is."""
    left, right, bottom, top = image.get_extent()
    for (i, j), value in np.ndenumerate(table):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
            x, y = left + (j + 0.5) * (right - left) / len(table), top + (i + 0.5) * (bottom - top) / len(table)
            text = f"{value:.{digits}f}".replace("0.", ".", 1)
            axes.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def _scale(bar: Any, chance: float) -> None:
    """The colour scale, with the level of chance in it."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    if not math.isnan(chance):
        for colour, style in (("black", "-"), ("white", (0, (1, 1)))):  # seen on any colour
            bar.ax.axhline(chance, color=colour, linestyle=style, linewidth=1.6)


@dataclass(frozen=True)
class _Panel:
    """One set of axes: lines by name, levels of chance and whose they are, where the y axis begins."""

    title: str
    lines: Mapping[str, Line]
    levels: Mapping[float, Sequence[str]] = field(default_factory=dict)
    from_zero: bool = True
    x: str = "layer"


def _curves(analysis: Analysis) -> Iterator[Picture]:
    """Similarity, change, rank and norm over the layers, by kind of module."""
    if all(place.layer is None for place in analysis.places.values()):
        return
    rows, units = analysis.similarity, len(analysis.units)
    pairs = len({(row.unit1, row.unit2) for row in rows})
    over = f"mean over {pairs} pairs of units" if pairs > 1 else "one pair of units, so no spread"
    caption = f"One line per kind of module; {over}. Dotted: what random matrices of these shapes reach."
    panels = [_panel(where(rows, *key), key, named(*key)) for key in measures(rows)]
    yield from _lines("similarity-layers", "How alike, over the layers", caption, panels)

    rows = analysis.changes
    caption = f"Columns, mean over {units} units. Length in the weights' own unit; direction: 1 − cosine."
    panels = [
        _panel(where(rows, *key, unit2), key, f"{named(*key)} from {unit2}")
        for key in measures(rows)
        if key[1] in ("magnitude", "direction")
        for unit2 in origins(rows, *key)
    ]
    yield from _lines("changes-layers", "How far from the start", caption, panels)

    rows = analysis.norms
    rank = max((unit.rank for unit in analysis.units if unit.rank), default=0)
    caption = f"The weight's change by kind of module, mean over {units} units."
    panels = [
        _panel(where(rows, *key), key, named(*key) + most)
        for key, most in ((("sBA", "effective_rank"), f" (at most {rank})"), (("sBA", "frobenius"), ""))
    ]
    yield from _lines("update-layers", "Rank and size of the change", caption, panels)

    norms = sorted(key for key in measures(rows) if key[1] == "frobenius")
    panels = []
    for key in [("sBA", "frobenius")] if ("sBA", "frobenius") in norms else norms:
        lines = over_layers(where(rows, *key), "unit1")
        panels.append(_Panel(named(*key), {label: lines[label] for label in analysis.labels if label in lines}))
    caption = "One line per unit, mean over the layer's modules: which task moves which layers."
    yield from _lines("norms-units", "Size by unit", caption, panels)


def _panel(rows: Sequence[Row], key: Key, title: str) -> _Panel:
    levels: dict[float, list[str]] = {}
    for (kind,), chance in sorted(means(rows, "kind", of="chance").items()):
        if chance.known:
            levels.setdefault(round(chance.mean, 4), []).append(kind)
    if levels:
        ends = dict.fromkeys(f"{value:.3f}" for value in (min(levels), max(levels)))
        title += f" (chance {' to '.join(ends)})"
    return _Panel(title, over_layers(rows), levels, from_zero=key[1] != "cosine")


def _conflicts(analysis: Analysis) -> Iterator[Picture]:
    """A figure per file: pairs of tasks in conflict, and the size of gradients, over the steps."""
    files = [file for file in analysis.conflicts if file.rows]
    for number, file in enumerate(files, 1):
        shares, norms, looks = _by_step(file)
        panels = [
            _Panel("pairs of tasks in conflict (share)", shares, {0.5: ["all"]} if shares else {}, x="step"),
            _Panel("norm of the gradient", norms, x="step"),
        ]
        caption = (
            f"From {file.path.name}. Two tasks conflict where the cosine of their gradients is negative; what each task"
            " has to itself (A under task routing) cannot conflict. Dotted: random directions, half of all pairs."
        )
        name = "conflicts" if len(files) == 1 else f"conflicts-{number}"
        yield from _lines(name, "Gradient conflicts while training", caption, panels, looks)


def _by_step(file: ConflictFile) -> tuple[dict[str, dict[int, Mean]], dict[str, dict[int, Mean]], Looks]:
    """Lines of the share of conflicts and of the norm, one per kind of module and matrix."""
    at = places({row.module for row in file.rows})
    groups: dict[tuple[int, str, str], list[Measured]] = {}
    for row in file.rows:
        groups.setdefault((row.step, at[row.module].kind, row.parameter), []).append(row)
    shares: dict[str, dict[int, Mean]] = {}
    norms: dict[str, dict[int, Mean]] = {}
    looks: dict[str, tuple[str, str]] = {}
    for (step, kind, parameter), rows in sorted(groups.items()):
        name = f"{kind} {parameter}"
        looks[name] = kind, parameter
        norms.setdefault(name, {})[step] = mean_of(row.norm for row in rows)
        if any(row.pairs for row in rows):
            shares.setdefault(name, {})[step] = mean_of([share_of(rows)])
    return shares, norms, looks


def _lines(
    name: str, title: str, caption: str, panels: Sequence[_Panel], looks: Looks | None = None
) -> Iterator[Picture]:
    """A figure of curves, a row or two of panels under one legend, if there is anything to draw."""
    panels = [panel for panel in panels if any(panel.lines.values())]
    if not panels:
        return
    columns = min(2, len(panels))
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    per_row = max(1, min(len(names) + 1, 110 // (max(len(clipped(name, LONG)) for name in names) + 7)))
    legend = 0.3 * math.ceil(len(names) / per_row) + 0.15
    looks = looks or {name: (name, "") for name in names}

    def paint(figure: Any, theme: Theme) -> None:
        from matplotlib.lines import Line2D

        styles = _styles(looks, theme)
        for axes, panel in zip(plotting.grid(figure, len(panels), columns), panels):
            _draw(axes, panel, styles, theme)
        handles = [Line2D([], [], linewidth=1.8, label=clipped(name, LONG), **styles[name]) for name in names]
        if any(panel.levels for panel in panels):
            handles.append(Line2D([], [], color=theme["ink"], linestyle=(0, (1, 2)), linewidth=1.2, label="chance"))
        figure.legend(handles=handles, loc="outside lower center", ncols=per_row, frameon=False, fontsize=8)

    alt = "Line charts. " + " ".join(_in_words(panel) for panel in panels)
    size = (10.4 if columns == 2 else 7.0, 2.9 * math.ceil(len(panels) / columns) + legend)
    yield _picture(name, title, caption, alt, size, paint)


def _in_words(panel: _Panel) -> str:
    """For up to eight lines the mean, and where it is highest."""
    parts = []
    for name, line in list(panel.lines.items())[:8]:
        known = {x: mean.mean for x, mean in line.items() if mean.known}
        if known:
            top = max(known, key=known.__getitem__)
            average = math.fsum(known.values()) / len(known)
            parts.append(f"{name} {average:.3g}, highest {known[top]:.3g} at {panel.x} {top}")
    more = f"; and {len(panel.lines) - 8} more" if len(panel.lines) > 8 else ""
    return f"{panel.title}, mean over {panel.x}s: {'; '.join(parts)}{more}."


def _styles(looks: Looks, theme: Theme) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each line; with more kinds than colours, dashes tell those of one colour apart."""
    colours = (*plotting.COLOURS[:6], theme["soft"])
    hues = list(dict.fromkeys(hue for hue, _ in looks.values()))
    dashes = sorted({dash for _, dash in looks.values()}, reverse=True)  # B, which is shared, is drawn through
    at = {name: (hues.index(hue), dashes.index(dash)) for name, (hue, dash) in looks.items()}
    return {
        name: {"color": colours[h % len(colours)], "linestyle": DASHES[(h // len(colours) + d) % len(DASHES)]}
        for name, (h, d) in at.items()
    }


def _draw(axes: Any, panel: _Panel, styles: Mapping[str, Mapping[str, Any]], theme: Theme) -> None:
    for name, line in panel.lines.items():
        xs, means = list(line), [mean.mean for mean in line.values()]
        marker = "." if len(xs) <= 40 else ""
        axes.plot(xs, means, marker=marker, markersize=4, linewidth=1.4, **styles[name])
        if len(panel.lines) <= MOST_BANDS and any(mean.known > 1 for mean in line.values()):
            low, high = [mean.low for mean in line.values()], [mean.high for mean in line.values()]
            axes.fill_between(xs, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
    for level in panel.levels:
        axes.axhline(level, color=theme["ink"], linestyle=(0, (1, 2)), linewidth=1.0, zorder=1)
    bottom, top = axes.get_ylim()
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    elif top - bottom < LEAST:  # rounding must not look like a curve
        axes.set_ylim((bottom + top - LEAST) / 2, (bottom + top + LEAST) / 2)
    axes.ticklabel_format(axis="y", useOffset=False)
    if 1 < len(panel.levels) <= 4:
        _whose(axes, panel.levels, theme)
    axes.set_title(panel.title, fontsize=9.5)
    axes.set_xlabel(panel.x, fontsize=8.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    plotting.tidy(axes)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _whose(axes: Any, levels: Mapping[float, Sequence[str]], theme: Theme) -> None:
    """At the right end of each level of chance the kinds it is for; of the largest group "others"."""
    largest = max(levels, key=lambda level: len(levels[level]))
    bottom, top = axes.get_ylim()
    style = {"transform": axes.get_yaxis_transform(), "fontsize": 7, "va": "center", "color": theme["soft"]}
    height = -1.0
    for level, kinds in sorted(levels.items()):
        height = max((level - bottom) / (top - bottom), height + 0.055)  # names must not cover each other
        text = "others" if level == largest and len(kinds) > 1 else ", ".join(clipped(kind, LONG) for kind in kinds)
        axes.text(1.01, bottom + height * (top - bottom), text, **style)
