"""Runs as PNG figures, from their ledgers' events: one with its clients' metric and bytes, or several side by side.

Several: a panel for each with mean and worst client against the bytes so far, the other runs in grey behind it. Of more
than eight clients only the worst is named. Where a client did not report, the mean takes its last value, or a lost
reply would look like a gain or a loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from .. import plotting
from ..plotting import BLUE, COLOURS, DARK_GREY, GREY, ORANGE
from ..text import printable
from .log import Event, Track, run_of, tracks

CLIENTS = (*COLOURS[:-1], "#882255")  # black is the mean's
SPACING = 0.055  # least distance of two names at line ends, as a part of the axis
LOG_FROM = 10.0  # methods whose bytes differ by more share a logarithmic axis
DPI = 150  # 10 inches: 1500 pixels, twice the width of a README


class Curve(NamedTuple):
    """Mean and worst client of a run over the rounds and the bytes so far; point 0 is the untuned model."""

    steps: list[int]
    nbytes: list[int]
    mean: list[float]
    worst: list[float]


def plot(events_by_run: Mapping[str, Sequence[Event]], path: str | os.PathLike[str]) -> Path:
    """Draw one run, or compare several, as the PNG file `path`; the runs' names are the titles."""
    if not events_by_run:
        raise ValueError("events_by_run is empty: give at least one run")
    plotting.check_matplotlib("the figures need matplotlib: pip install 'alora-kernels[federated]'")
    with plotting.themed(plotting.LIGHT):
        if len(events_by_run) == 1:
            figure = plotting.figure(10, 4.2, dpi=DPI)
            ((name, events),) = events_by_run.items()
            _one(figure, name, events)
        else:
            rows = math.ceil(len(events_by_run) / 4)
            columns = math.ceil(len(events_by_run) / rows)
            figure = plotting.figure(2.6 * columns + 0.6, 2.5 * rows + 0.6, dpi=DPI)
            _several(figure, events_by_run, rows, columns)
        return plotting.save(figure, Path(path))


def _one(figure: Any, name: str, events: Sequence[Event]) -> None:
    metric_axes, bytes_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    run = run_of(events)
    found, higher = tracks(events), run.get("higher_is_better", True)
    figure.suptitle(printable(name), fontsize=11)
    for axes in (metric_axes, bytes_axes):
        axes.set_xlabel("rounds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
    _metric_panel(metric_axes, found, curve(events), higher)
    metric_axes.set_ylabel(printable(str(run.get("metric", "metric"))))
    _bytes_panel(bytes_axes, found)


def _metric_panel(axes: Any, found: Sequence[Track], mine: Curve, higher: bool) -> None:
    """Solid: with the arrays all share; open circles: after local training; crosses: rejected."""
    colours = _colours(found, higher)
    ends: list[tuple[str, str, float, float]] = []
    for index, track in enumerate(found):
        colour = colours[track.name]
        if track.shared:
            last = max(track.shared)
            values = [track.shared.get(step, math.nan) for step in range(last + 1)]
            axes.plot(range(last + 1), values, ".-", color=colour, linewidth=1.2, markersize=4)
            ends.append((track.name, colour, last, values[-1]))
        if colour != GREY:
            axes.plot(list(track.local), list(track.local.values()), "o", mfc="none", mec=colour, ms=4, mew=0.8)
        lost = sorted({number for number, _ in track.rejected})
        height = 0.02 + 0.035 * (index % len(CLIENTS))  # a row for each client
        axes.plot(lost, [height] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform(), markersize=5)
    if len(found) > 1 and mine.steps:
        axes.plot(mine.steps, mine.mean, color="black", linewidth=3, alpha=0.85, zorder=3)
        ends.append(("mean", "black", mine.steps[-1], mine.mean[-1]))
    if ends:
        keys: dict[str, dict[str, Any]] = {
            "shared arrays after the round": {"marker": "."},
            "after local training": {"marker": "o", "mfc": "none", "linestyle": ""},
        }
        if any(track.rejected for track in found):
            keys["rejected or silent"] = {"marker": "x", "linestyle": ""}
        _key(axes, keys, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        _names(axes, [end for end in ends if end[1] != GREY])
    else:
        _empty(axes, "no finished round")


def _colours(found: Sequence[Track], higher: bool) -> dict[str, str]:
    """A colour for each of few clients; of many, one for the worst and light grey for the others."""
    if len(found) <= len(CLIENTS):
        return {track.name: colour for track, colour in zip(found, CLIENTS)}
    last = {track.name: track.shared[max(track.shared)] for track in found if track.shared}
    worst = (min if higher else max)(last, key=last.__getitem__, default=None)
    return {track.name: CLIENTS[1] if track.name == worst else GREY for track in found}


def _key(drawn: Any, entries: Mapping[str, Mapping[str, Any]], **place: Any) -> None:
    """The legend of axes or of a figure: label -> how its line looks."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=label, **{"color": DARK_GREY, **style}) for label, style in entries.items()]
    drawn.legend(handles=lines, ncols=3, frameon=False, fontsize=8, **place)


def _names(axes: Any, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Names right of the panel, pushed apart where lines end close together; threads have the lines' colours."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[3])
    heights = spread([(end[3] - low) / (high - low) for end in ordered])
    for (name, colour, right, value), height in zip(ordered, heights):
        axes.annotate(
            printable(name),
            xy=(right, value),
            xycoords="data",
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            fontweight="bold" if name == "mean" else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1.2, "ls": ":", "shrinkA": 1, "shrinkB": 3},
        )


def spread(heights: Sequence[float]) -> list[float]:
    """Rising heights moved as little as needed to be SPACING apart, together around where they were."""
    groups: list[tuple[float, int]] = []  # (centre, how many) of names that touch
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1:
            (below, m), (above, n) = groups[-2:]
            if above - below >= SPACING * (m + n) / 2:
                break
            groups[-2:] = [((below * m + above * n) / (m + n), m + n)]
    return [centre + SPACING * (i - (count - 1) / 2) for centre, count in groups for i in range(count)]


def _bytes_panel(axes: Any, found: Sequence[Track]) -> None:
    """Bytes up and down so far, one client on the other."""
    end = max((max(track.nbytes, default=0) for track in found), default=0)
    steps = list(range(end + 1))
    stack = [list(accumulate(track.nbytes.get(step, 0) for step in steps)) for track in found]
    axes.set_ylabel("up and down so far")
    if not any(layer[-1] for layer in stack):
        _empty(axes, "nothing was sent")
        return
    axes.yaxis.set_major_formatter(_bytes_format())
    named = len(found) <= len(CLIENTS)
    colours = CLIENTS if named else [GREY] * len(found)
    axes.stackplot(steps, stack, colors=colours[: len(found)], alpha=0.75, edgecolor="white", linewidth=0.5)
    axes.set_ylim(bottom=0)
    if named:
        tops = accumulate(layer[-1] for layer in stack)
        middles = [top - layer[-1] / 2 for top, layer in zip(tops, stack)]
        _names(axes, [(t.name, colour, end, y) for t, colour, y in zip(found, CLIENTS, middles)])


def _bytes_format() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit="B")


def _empty(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=DARK_GREY)
    axes.set(xticks=[], yticks=[])


def _several(figure: Any, events_by_run: Mapping[str, Sequence[Event]], rows: int, columns: int) -> None:
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    curves = {name: curve(events) for name, events in events_by_run.items()}
    sent = [c.nbytes[-1] for c in curves.values() if c.nbytes and c.nbytes[-1]]
    log = bool(sent) and max(sent) / min(sent) > LOG_FROM
    cells = [axes for row in grid for axes in row]
    for axes, (name, mine) in zip(cells, curves.items()):
        for other in curves.values():
            _curve(axes, other, log, (GREY, GREY))
        _curve(axes, mine, log, (BLUE, ORANGE), linewidth=2)
        axes.set_title(printable(name), fontsize=9)
        _tidy(axes)
    if log:
        cells[0].set_xscale("log")
    else:
        cells[0].locator_params(axis="x", nbins=4)  # wide labels
    cells[0].xaxis.set_major_formatter(_bytes_format())
    for axes in cells[len(curves) :]:
        axes.set_axis_off()
    for axes in cells[max(len(curves) - columns, 0) : len(curves)]:
        axes.tick_params(labelbottom=True)  # nothing is drawn below it
    metric = str(run_of(next(iter(events_by_run.values()))).get("metric", "metric"))
    figure.supylabel(printable(metric), fontsize=9)
    figure.supxlabel("up and down so far" + ", logarithmic" * log, fontsize=9)
    keys: dict[str, dict[str, Any]] = {
        "mean of the clients": {"color": BLUE, "linewidth": 2},
        "worst client": {"color": ORANGE, "linewidth": 2, "linestyle": "--"},
        "the other runs": {"color": GREY},
    }
    _key(figure, keys, loc="outside upper center")


def _curve(axes: Any, line: Curve, log: bool, colours: tuple[str, str], linewidth: float = 1) -> None:
    """A run's two lines; a run that sends nothing is a level across the panel."""
    for values, colour, style in zip((line.mean, line.worst), colours, ("-", "--")):
        if not values:
            continue
        if not line.nbytes[-1]:
            axes.axhline(values[-1], color=colour, linestyle=style, linewidth=linewidth)
        else:
            first = int(log)  # zero bytes have no place on a logarithmic axis
            x, marker = line.nbytes[first:], "." if len(values) == first + 1 else ""
            axes.plot(x, values[first:], color=colour, linestyle=style, linewidth=linewidth, marker=marker)


def curve(events: Sequence[Event]) -> Curve:
    """Mean and worst of the clients' last known values, one point for each number of rounds behind the model."""
    found, worst_of = tracks(events), min if run_of(events).get("higher_is_better", True) else max
    steps = sorted({step for track in found for step in track.shared})
    each = [sum(track.nbytes.get(step, 0) for track in found) for step in range(max(steps, default=-1) + 1)]
    so_far = list(accumulate(each))
    known: dict[int, float] = {}
    mean, worst = [], []
    for step in steps:
        known |= {index: track.shared[step] for index, track in enumerate(found) if step in track.shared}
        mean.append(math.fsum(known.values()) / len(known))
        worst.append(worst_of(known.values()))
    return Curve(steps, [so_far[step] for step in steps], mean, worst)


def _tidy(axes: Any) -> None:
    plotting.tidy(axes)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
