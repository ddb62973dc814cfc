"""Curves over the layers: similarity, change, rank and norm by kind of module; gradient conflicts over the steps.

In:   an `Analysis`.
Out:  `Plan`s, each a row or two of panels under one legend.
Who:  `figures.pictures`.

Colours are Tol's "bright" set, which colour-blind readers can tell apart and which shows on white and on black; beyond
seven lines the dashes change. Where chance is not zero it is drawn dotted, and its value stands in the panel's title.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .labels import NAMES
from .names import clipped
from .plan import Plan
from .table import Mean, Row, mean_of, measures, over_layers, where

if TYPE_CHECKING:
    from .result import Analysis

# Paul Tol, "Colour schemes", 2021: bright; its grey is the theme's
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
DASHES = ("-", "--", ":", "-.")
MOST_BANDS = 3  # lines up to which the range is shaded
WIDE = 26  # characters of a name
LEAST = 0.05  # range of an axis of cosines
Line = Mapping[int, Mean]


@dataclass(frozen=True)
class Panel:
    """One set of axes: lines by name, levels of chance and whose they are, where the y axis begins."""

    title: str
    lines: Mapping[str, Line]
    levels: Mapping[float, Sequence[str]] = field(default_factory=dict)
    from_zero: bool = True
    x: str = "layer"


def plans(analysis: Analysis) -> Iterator[Plan]:
    """What there are numbers for."""
    if any(place.layer is not None for place in analysis.places.values()):
        yield from _similarity(analysis)
        yield from _changes(analysis)
        yield from _sizes(analysis)
    yield from _conflicts(analysis)


def _similarity(analysis: Analysis) -> Iterator[Plan]:
    panels = [_panel(where(analysis.similarity, *key), key) for key in measures(analysis.similarity)]
    pairs = len({(row.unit1, row.unit2) for row in analysis.similarity})
    over = f"mean over {pairs} pairs of units" if pairs > 1 else "one pair of units, so no spread"
    caption = f"One line per kind of module; {over}. Dotted: what random matrices of these shapes reach."
    yield from _plan("similarity-layers", "How alike, over the layers", caption, panels)


def _changes(analysis: Analysis) -> Iterator[Plan]:
    panels = []
    for part, measure in measures(analysis.changes):
        if measure not in ("magnitude", "direction"):
            continue
        for unit2 in dict.fromkeys(row.unit2 for row in where(analysis.changes, part, measure)):
            title = f"{NAMES[part, measure]} from {unit2}"
            panels.append(_panel(where(analysis.changes, part, measure, unit2), (part, measure), title))
    caption = f"Columns, mean over {len(analysis.units)} units. Length in the weights' own unit; direction: 1 − cosine."
    yield from _plan("changes-layers", "How far from the start", caption, panels)


def _sizes(analysis: Analysis) -> Iterator[Plan]:
    found = set(measures(analysis.norms))
    keys = [key for key in (("sBA", "effective_rank"), ("sBA", "frobenius")) if key in found]
    rank = max((unit.rank for unit in analysis.units if unit.rank), default=0)
    titles = {("sBA", "effective_rank"): f"{NAMES['sBA', 'effective_rank']} (at most {rank})"}
    panels = [_panel(where(analysis.norms, *key), key, titles.get(key)) for key in keys]
    caption = f"The weight's change by kind of module, mean over {len(analysis.units)} units."
    yield from _plan("update-layers", "Rank and size of the change", caption, panels)
    keys = [("sBA", "frobenius")] if ("sBA", "frobenius") in found else [key for key in found if key[1] == "frobenius"]
    panels = [_by_unit(analysis, key) for key in sorted(keys)]
    caption = "One line per unit, mean over the layer's modules: which task moves which layers."
    yield from _plan("norms-units", "Size by unit", caption, panels)


def _by_unit(analysis: Analysis, key: tuple[str, str]) -> Panel:
    rows = where(analysis.norms, *key)
    lines: dict[str, dict[int, Mean]] = {}
    for label in analysis.labels:
        layers: dict[int, list[float]] = {}
        for row in rows:
            if row.unit1 == label and row.layer is not None:
                layers.setdefault(row.layer, []).append(row.value)
        if layers:
            lines[label] = {n: mean_of(values) for n, values in sorted(layers.items())}
    return Panel(NAMES[key], lines)


def _conflicts(analysis: Analysis) -> Iterator[Plan]:
    """A figure per file: pairs of tasks in conflict, and the size of gradients, over the steps."""
    from .names import places

    files = [file for file in analysis.conflicts if file.rows]
    for number, file in enumerate(files, 1):
        at = places({row.module for row in file.rows})
        shares: dict[str, dict[int, Mean]] = {}
        norms: dict[str, dict[int, Mean]] = {}
        looks: dict[str, tuple[str, str]] = {}
        for step, rows in file.by_step():
            for kind, parameter in sorted({(at[row.module].kind, row.parameter) for row in rows}):
                same = [r for r in rows if (at[r.module].kind, r.parameter) == (kind, parameter)]
                name = f"{kind} {parameter}"
                looks[name] = kind, parameter
                norms.setdefault(name, {})[step] = mean_of(row.norm for row in same)
                if any(row.pairs for row in same):
                    shares.setdefault(name, {})[step] = mean_of([file.share(same)])
        panels = [
            Panel("pairs of tasks in conflict (share)", shares, {0.5: ["all"]} if shares else {}, x="step"),
            Panel("norm of the gradient", norms, x="step"),
        ]
        caption = (
            f"From {file.path.name}. Two tasks conflict where the cosine of their gradients is negative; what each task"
            " has to itself (A under task routing) cannot conflict. Dotted: random directions, half of all pairs."
        )
        name = "conflicts" if len(files) == 1 else f"conflicts-{number}"
        yield from _plan(name, "Gradient conflicts while training", caption, panels, looks)


def _panel(rows: Sequence[Row], key: tuple[str, str], title: str | None = None) -> Panel:
    levels: dict[float, list[str]] = {}
    for kind in sorted({row.kind for row in rows}):
        chance = mean_of(row.chance for row in rows if row.kind == kind and row.chance is not None)
        if chance.known:
            levels.setdefault(round(chance.mean, 4), []).append(kind)
    text = title or NAMES[key]
    if levels:
        ends = dict.fromkeys(f"{value:.3f}" for value in (min(levels), max(levels)))
        text += f" (chance {' to '.join(ends)})"
    return Panel(text, over_layers(rows), levels, from_zero=key[1] != "cosine")


def _plan(
    name: str, title: str, caption: str, panels: Sequence[Panel], looks: Mapping[str, tuple[str, str]] | None = None
) -> Iterator[Plan]:
    """A figure, if there is anything to draw; `looks` says of a line what its colour and its dashes stand for."""
    panels = [panel for panel in panels if any(panel.lines.values())]
    if not panels:
        return
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    legend = 0.3 * math.ceil(len(names) / _per_row(names)) + 0.15
    size = (10.4 if columns == 2 else 7.0, 2.9 * lines + legend)
    alt = "Line charts. " + " ".join(_told(panel) for panel in panels)
    styled = partial(_styles, {name: (looks or {}).get(name, (name, "")) for name in names})
    yield Plan(name, title, caption, alt, size, partial(_paint, panels=panels, styled=styled, columns=columns))


def _told(panel: Panel) -> str:
    """A panel in words: for up to eight lines the mean, and where it is highest."""
    parts = []
    for name, line in list(panel.lines.items())[:8]:
        known = {x: mean.mean for x, mean in line.items() if mean.known}
        if known:
            top = max(known, key=known.__getitem__)
            average = math.fsum(known.values()) / len(known)
            parts.append(f"{name} {average:.3g}, highest {known[top]:.3g} at {panel.x} {top}")
    more = f"; and {len(panel.lines) - 8} more" if len(panel.lines) > 8 else ""
    return f"{panel.title}, mean over {panel.x}s: {'; '.join(parts)}{more}."


def _per_row(names: Sequence[str]) -> int:
    longest = max(len(clipped(name, WIDE)) for name in names)
    return max(1, min(len(names) + 1, 110 // (longest + 7)))


Styles = dict[str, dict[str, Any]]


def _styles(looks: Mapping[str, tuple[str, str]], theme: dict[str, str]) -> Styles:
    """Colour and dashes of each line; with more kinds than colours, dashes tell those of one colour apart."""
    colours = (*COLOURS, theme["soft"])
    hues = list(dict.fromkeys(hue for hue, _ in looks.values()))
    dashes = sorted({dash for _, dash in looks.values()}, reverse=True)  # B, which is shared, is drawn through
    places = {name: (hues.index(hue), dashes.index(dash)) for name, (hue, dash) in looks.items()}
    return {
        name: {"color": colours[h % len(colours)], "linestyle": DASHES[(h // len(colours) + d) % len(DASHES)]}
        for name, (h, d) in places.items()
    }


def _paint(
    figure: Any,
    theme: dict[str, str],
    *,
    panels: Sequence[Panel],
    styled: Callable[[dict[str, str]], Styles],
    columns: int,
) -> None:
    from matplotlib.lines import Line2D

    lines = math.ceil(len(panels) / columns)
    cells = figure.subplots(lines, columns, squeeze=False).flatten()
    styles = styled(theme)
    for axes, panel in zip(cells, panels):
        _draw(axes, panel, styles, theme)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], linewidth=1.8, label=clipped(name, WIDE), **style) for name, style in styles.items()]
    if any(panel.levels for panel in panels):
        handles.append(Line2D([], [], color=theme["ink"], linestyle=(0, (1, 2)), linewidth=1.2, label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=_per_row(list(styles)), frameon=False, fontsize=8)


def _draw(axes: Any, panel: Panel, styles: Styles, theme: dict[str, str]) -> None:
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _whose(axes: Any, levels: Mapping[float, Sequence[str]], theme: dict[str, str]) -> None:
    """At the right end of each level of chance the kinds it is for; of the largest group "others"."""
    largest = max(levels, key=lambda level: len(levels[level]))
    bottom, top = axes.get_ylim()
    below = -1.0
    for level, kinds in sorted(levels.items()):
        height = max((level - bottom) / (top - bottom), below + 0.055)  # names must not cover each other
        below = height
        text = "others" if level == largest and len(kinds) > 1 else ", ".join(clipped(kind, WIDE) for kind in kinds)
        place = axes.get_yaxis_transform(), {"fontsize": 7, "va": "center", "color": theme["soft"]}
        axes.text(1.01, bottom + height * (top - bottom), text, transform=place[0], **place[1])
