"""Figures of runs: the clients' metric and the bytes of one, or several methods side by side.

In:   events of ledgers, by the run's name.
Out:  a PNG file.
Who:  the command line and the examples, after a run or during one.

One run: each client's metric over the rounds and the bytes so far. Several: a panel for each with mean and worst client
against the bytes so far, the other runs in grey behind it, all on the same axes. Colours are Tol's "muted" set, which
colour-blind readers can tell apart; lines have their names at their ends. Of more than eight clients only the worst is
named. Where a client did not report, the mean takes its last value, or a lost reply would look like a gain or a loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from .summary import Event, Track, run_of, tracks
from .view import clean

# Paul Tol, "Colour schemes", 2021: muted, without its pale yellow
COLOURS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
GREY, LIGHT = "#555555", "#CCCCCC"
SPACING = 0.055  # least distance of two names at line ends, as a part of the axis
LOG_FROM = 10.0  # methods whose bytes differ by more share a logarithmic axis
DPI = 150  # 10 inches: 1500 pixels, twice the width of a README


class Curve(NamedTuple):
    """Mean and worst client of a run against the bytes so far; x[0] is 0, the untuned model."""

    nbytes: list[int]
    mean: list[float]
    worst: list[float]


def plot(events_by_run: Mapping[str, Sequence[Event]], path: str | os.PathLike[str]) -> Path:
    """Draw one run, or compare several.

    Args:
        events_by_run: name -> events, `ledger.read`; names are the titles.
        path: of the PNG file.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no run.
    """
    if not events_by_run:
        raise ValueError("events_by_run is empty: give at least one run")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the figures need matplotlib: pip install 'alora-kernels[federated]'") from None
    if len(events_by_run) == 1:
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        ((name, events),) = events_by_run.items()
        _one(figure, name, events)
    else:
        rows = math.ceil(len(events_by_run) / 4)
        columns = math.ceil(len(events_by_run) / rows)
        figure = Figure(figsize=(2.6 * columns + 0.6, 2.5 * rows + 0.6), layout="constrained")
        _several(figure, events_by_run, rows, columns)
    figure.savefig(path, dpi=DPI, format="png")
    return Path(path)


def _one(figure: Any, name: str, events: Sequence[Event]) -> None:
    metric_axes, bytes_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    run = run_of(events)
    found, higher = list(tracks(events).values()), run.get("higher_is_better", True)
    figure.suptitle(_plain(name), fontsize=11)
    for axes in (metric_axes, bytes_axes):
        axes.set_xlabel("rounds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
    _metric_panel(metric_axes, found, higher)
    metric_axes.set_ylabel(_plain(str(run.get("metric", "metric"))))
    _bytes_panel(bytes_axes, found)


def _metric_panel(axes: Any, found: Sequence[Track], higher: bool) -> None:
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
        if colour != LIGHT:
            axes.plot(list(track.local), list(track.local.values()), "o", mfc="none", mec=colour, ms=4, mew=0.8)
        lost = sorted({number for number, _ in track.rejected})
        height = 0.02 + 0.035 * (index % len(COLOURS))  # a row for each client
        axes.plot(lost, [height] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform(), markersize=5)
    steps, mean, _ = _over_clients(found, higher=higher)
    if len(found) > 1 and steps:
        axes.plot(steps, mean, color="black", linewidth=3, alpha=0.85, zorder=3)
        ends.append(("mean", "black", steps[-1], mean[-1]))
    if ends:
        _keys(axes, any(track.rejected for track in found))
        _names(axes, [end for end in ends if end[1] != LIGHT])
    else:
        _empty(axes, "no finished round")


def _colours(found: Sequence[Track], higher: bool) -> dict[str, str]:
    """A colour for each of few clients; of many, one for the worst and light grey for the others."""
    if len(found) <= len(COLOURS):
        return {track.name: colour for track, colour in zip(found, COLOURS)}
    last = {track.name: track.shared[max(track.shared)] for track in found if track.shared}
    worst = (min if higher else max)(last, key=last.__getitem__, default=None)
    return {track.name: COLOURS[1] if track.name == worst else LIGHT for track in found}


def _keys(axes: Any, rejected: bool) -> None:
    """What solid, circle and cross mean, below the panel."""
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color=GREY, marker=".", label="shared arrays after the round"),
        Line2D([], [], color=GREY, marker="o", mfc="none", linestyle="", label="after local training"),
    ]
    if rejected:
        keys.append(Line2D([], [], color=GREY, marker="x", linestyle="", label="rejected or silent"))
    axes.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=8)


def _names(axes: Any, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Names right of the panel, pushed apart where lines end close together; threads have the lines' colours."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[3])
    heights = spread([(end[3] - low) / (high - low) for end in ordered])
    for (name, colour, right, value), height in zip(ordered, heights):
        axes.annotate(
            _plain(name),
            xy=(right, value),
            xycoords="data",
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            fontweight="bold" if name == "mean" else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 1.2,
                "linestyle": ":",
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def spread(heights: Sequence[float], distance: float = SPACING) -> list[float]:
    """Rising heights moved as little as needed to be `distance` apart, together around where they were."""
    groups: list[tuple[float, int]] = []  # (centre, how many) of names that touch
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1:
            (below, m), (above, n) = groups[-2:]
            if above - below >= distance * (m + n) / 2:
                break
            groups[-2:] = [((below * m + above * n) / (m + n), m + n)]
    return [centre + distance * (i - (count - 1) / 2) for centre, count in groups for i in range(count)]


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
    named = len(found) <= len(COLOURS)
    colours = COLOURS if named else [LIGHT] * len(found)
    axes.stackplot(steps, stack, colors=colours[: len(found)], alpha=0.75, edgecolor="white", linewidth=0.5)
    axes.set_ylim(bottom=0)
    if named:
        tops = accumulate(layer[-1] for layer in stack)
        middles = [top - layer[-1] / 2 for top, layer in zip(tops, stack)]
        _names(axes, [(t.name, colour, end, y) for t, colour, y in zip(found, COLOURS, middles)])


def _bytes_format() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit="B")


def _empty(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xticks=[], yticks=[])


def _several(figure: Any, events_by_run: Mapping[str, Sequence[Event]], rows: int, columns: int) -> None:
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    curves = {name: curve(events) for name, events in events_by_run.items()}
    sent = [c.nbytes[-1] for c in curves.values() if c.nbytes and c.nbytes[-1]]
    log = bool(sent) and max(sent) / min(sent) > LOG_FROM
    cells = [axes for row in grid for axes in row]
    for axes, (name, mine) in zip(cells, curves.items()):
        for other in curves.values():
            _curve(axes, other, log, (LIGHT, LIGHT))
        _curve(axes, mine, log, (COLOURS[0], COLOURS[1]), linewidth=2)
        axes.set_title(_plain(name), fontsize=9)
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
    figure.supylabel(_plain(metric), fontsize=9)
    figure.supxlabel("up and down so far" + ", logarithmic" * log, fontsize=9)
    _methods_key(figure)


def _methods_key(figure: Any) -> None:
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color=COLOURS[0], linewidth=2, label="mean of the clients"),
        Line2D([], [], color=COLOURS[1], linewidth=2, linestyle="--", label="worst client"),
        Line2D([], [], color=LIGHT, label="the other runs"),
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=3, frameon=False, fontsize=8)


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
    """Mean and worst client over the bytes so far, one point for each number of rounds behind the model."""
    found = list(tracks(events).values())
    steps, mean, worst = _over_clients(found, higher=run_of(events).get("higher_is_better", True))
    each = [sum(track.nbytes.get(step, 0) for track in found) for step in range(max(steps, default=-1) + 1)]
    so_far = list(accumulate(each))
    return Curve([so_far[step] for step in steps], mean, worst)


def _over_clients(found: Iterable[Track], *, higher: bool) -> tuple[list[int], list[float], list[float]]:
    """Rounds, and mean and worst of the clients' last known values."""
    series = [track.shared for track in found]
    steps = sorted({step for values in series for step in values})
    known: dict[int, float] = {}
    mean, worst = [], []
    for step in steps:
        known |= {index: values[step] for index, values in enumerate(series) if step in values}
        mean.append(math.fsum(known.values()) / len(known))
        worst.append((min if higher else max)(known.values()))
    return steps, mean, worst


def _plain(name: str) -> str:
    """A name as matplotlib shall print it: a dollar sign would begin a formula."""
    return clean(name).replace("$", r"\$")


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
