"""A run as a PNG figure, from its ledger's events: its clients' metric and what was sent, over the rounds.

Of more than eight clients only the worst is named. Where a client did not report, the mean takes its last value, or a
lost reply would look like a gain or a loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from .. import plotting
from ..plotting import COLOURS, DARK_GREY, GREY
from ..text import printable
from .log import Event, Track, run_of, tracks

CLIENTS = (*COLOURS[:-1], "#882255")  # black is the mean's
SPACING = 0.055  # least distance of two names at line ends, as a part of the axis
DPI = 150  # 10 inches: 1500 pixels, twice the width of a README


def plot(events: Sequence[Event], path: str | os.PathLike[str]) -> Path:
    """Draw a run as the PNG file `path`, under the name of its method."""
    plotting.check_matplotlib("the figures need matplotlib: pip install 'alora-kernels[federated]'")
    run, found = run_of(events), tracks(events)
    with plotting.themed(plotting.LIGHT):
        figure = plotting.figure(10, 4.2, dpi=DPI)
        metric_axes, bytes_axes = figure.subplots(1, 2, width_ratios=(3, 2))
        figure.suptitle(printable(str(run.get("method", "run"))), fontsize=11)
        for axes in (metric_axes, bytes_axes):
            axes.set_xlabel("rounds")
            axes.xaxis.get_major_locator().set_params(integer=True)
            plotting.tidy(axes)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        _metric_panel(metric_axes, found, run.get("higher_is_better", True))
        metric_axes.set_ylabel(printable(str(run.get("metric", "metric"))))
        _bytes_panel(bytes_axes, found)
        return plotting.save(figure, Path(path))


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
        if colour != GREY:
            axes.plot(list(track.local), list(track.local.values()), "o", mfc="none", mec=colour, ms=4, mew=0.8)
        lost = sorted({number for number, _ in track.rejected})
        height = 0.02 + 0.035 * (index % len(CLIENTS))  # a row for each client
        axes.plot(lost, [height] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform(), markersize=5)
    if not ends:
        _empty(axes, "no finished round")
        return
    if len(found) > 1:
        mean = mean_of(found)
        axes.plot(list(mean), list(mean.values()), color="black", linewidth=3, alpha=0.85, zorder=3)
        ends.append(("mean", "black", *list(mean.items())[-1]))
    _key(axes, any(track.rejected for track in found))
    _names(axes, [end for end in ends if end[1] != GREY])


def _colours(found: Sequence[Track], higher: bool) -> dict[str, str]:
    """A colour for each of few clients; of many, one for the worst and light grey for the others."""
    if len(found) <= len(CLIENTS):
        return {track.name: colour for track, colour in zip(found, CLIENTS)}
    last = {track.name: track.shared[max(track.shared)] for track in found if track.shared}
    worst = (min if higher else max)(last, key=last.__getitem__, default=None)
    return {track.name: CLIENTS[1] if track.name == worst else GREY for track in found}


def mean_of(found: Sequence[Track]) -> dict[int, float]:
    """Rounds behind the model -> mean of the clients' last known values; 0 is the untuned model."""
    known: dict[int, float] = {}
    mean = {}
    for step in sorted({step for track in found for step in track.shared}):
        known |= {index: track.shared[step] for index, track in enumerate(found) if step in track.shared}
        mean[step] = math.fsum(known.values()) / len(known)
    return mean


def _key(axes: Any, rejections: bool) -> None:
    from matplotlib.lines import Line2D

    entries: dict[str, dict[str, Any]] = {
        "shared arrays after the round": {"marker": "."},
        "after local training": {"marker": "o", "mfc": "none", "linestyle": ""},
    }
    if rejections:
        entries["rejected or silent"] = {"marker": "x", "linestyle": ""}
    lines = [Line2D([], [], label=label, color=DARK_GREY, **style) for label, style in entries.items()]
    axes.legend(handles=lines, ncols=3, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))


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
    from matplotlib.ticker import EngFormatter

    end = max((max(track.nbytes, default=0) for track in found), default=0)
    steps = list(range(end + 1))
    stack = [list(accumulate(track.nbytes.get(step, 0) for step in steps)) for track in found]
    axes.set_ylabel("up and down so far")
    if not any(layer[-1] for layer in stack):
        _empty(axes, "nothing was sent")
        return
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    named = len(found) <= len(CLIENTS)
    colours = CLIENTS if named else [GREY] * len(found)
    axes.stackplot(steps, stack, colors=colours[: len(found)], alpha=0.75, edgecolor="white", linewidth=0.5)
    axes.set_ylim(bottom=0)
    if named:
        tops = accumulate(layer[-1] for layer in stack)
        middles = [top - layer[-1] / 2 for top, layer in zip(tops, stack)]
        _names(axes, [(t.name, colour, end, y) for t, colour, y in zip(found, CLIENTS, middles)])


def _empty(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=DARK_GREY)
    axes.set(xticks=[], yticks=[])
