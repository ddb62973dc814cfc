"""A run to look at, from a ledger's events or its path: tables in the terminal, during and after it, and a PNG figure.

On something that is not a terminal, one plain line per finished round. What clients wrote (names, reasons) is shown
without control characters and markup: a client must not move another's cursor. A table fits 80 columns.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import plotting
from ..plotting import COLOURS, DARK_GREY, GREY
from ..text import install, printable, size
from .log import Event, Track, last_round, of_kind, read, run_of, tracks

BLOCKS = "▁▂▃▄▅▆▇█"
GAP = "·"  # a round without a value
TREND = 8  # columns of a sparkline
NAME = 14  # columns of a client's name
SHOWN = 4  # reasons below a table
INTERVAL = 0.5  # seconds between two looks at a file
NONE = "-"
CLIENTS = (*COLOURS[:-1], "#882255")  # black is the mean's
SPACING = 0.055  # least distance of two names at line ends, as a part of the axis
DPI = 150  # 10 inches: 1500 pixels, twice the width of a README


Row = tuple[Track, float | None, float | None, Text]  # a client, its metric before and after, the last column


def table(events: Sequence[Event], *, now: datetime | None = None) -> RenderableType:
    """The run so far, its time counted until `now` or else the last event.

    A header (method, round, time, bytes, epsilon), a row per client with the metric before and after its last local
    training, the clients' mean, worst and delta-m, and why replies of the last round were rejected.
    """
    if not run_of(events):
        return Text("waiting for the run to begin")
    found, last, rows = tracks(events), last_round(events), []
    for track in found:
        trained, state = max(track.local, default=0), track.state(last)
        shown = Text(printable(state), {"ok": "green", "waiting": "dim", "not asked": "dim"}.get(state, "red"))
        rows.append((track, track.shared.get(trained - 1), track.local.get(trained), shown))
    lost = [f"round {n}, {track.name}: {reason}" for track in found for n, reason in track.rejected if n == last]
    more = [f"and {len(lost) - SHOWN} more"] if len(lost) > SHOWN else []
    scores = [(e.get("before") or {}, e.get("after") or {}) for e in of_kind(events, "round", "train")[-1:]]
    return _page(events, now, ("before", "after", "state"), rows, scores, [*lost[:SHOWN], *more])


def summary(events: Sequence[Event]) -> RenderableType:
    """The finished run, from `log.read`: untuned against final metric of each client, bytes in all, and rejections."""
    if not run_of(events):
        return Text("the ledger holds no run")
    found, rows = tracks(events), []
    judged: Event = (of_kind(events, "round", "evaluate") or [{}])[-1]
    for track in found:
        lost = Text(str(len(track.rejected)), "red" if track.rejected else "")
        rows.append((track, track.shared.get(0), track.shared.get(judged.get("round", -1)), lost))
    notes = [f"{track.name}: {n} x {reason}" for track in found for reason, n in track.reasons.items()]
    scores = [(e.get("before") or {}, judged.get("metrics") or {}) for e in of_kind(events, "round", "train")[:1]]
    return _page(events, None, ("untuned", "final", "rejected"), rows, scores, notes)


def watch(
    path: str | Path,
    *,
    until: Callable[[], bool] | None = None,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
    since: datetime | None = None,
) -> list[dict[str, Any]]:
    """Show a ledger, which may not be there yet, while it grows; returns the events at the end.

    It stops when `until` is true, or at the ledger's "end" event if that is None. Nothing is shown until a run begins
    after `since`, nor lines of rounds before it.
    """
    console = console or Console()
    events: list[dict[str, Any]] = []
    looks = _looks(Path(path), until, sleep, since)
    if not console.is_terminal or console.is_dumb_terminal:
        printed = 0
        for events in looks:
            lines = list(_lines(events, since))
            for line in lines[printed:]:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            printed = len(lines)  # a resumed run may have cut the file
        return events
    with Live(table(events), console=console, auto_refresh=False, transient=False) as live:
        for events in looks:
            live.update(table(events, now=datetime.now(UTC)), refresh=True)
        live.update(table(events), refresh=True)
    return events


def _looks(
    path: Path, until: Callable[[], bool] | None, sleep: Callable[[float], None], since: datetime | None
) -> Iterator[list[dict[str, Any]]]:
    """What the file holds, again and again; the last time after it was complete."""
    while True:
        complete = until is not None and until()
        try:
            events = read(path)
        except FileNotFoundError:
            events = []
        if not any(_after(event, since) for event in of_kind(events, "run")):
            events = []  # of an earlier run, which this one goes on from
        yield events
        if complete or (until is None and events and events[-1]["event"] == "end"):
            return
        sleep(INTERVAL)


def _after(event: Event, since: datetime | None) -> bool:
    return since is None or datetime.fromisoformat(event["time"]) >= since


def _lines(events: Sequence[Event], since: datetime | None) -> Iterator[str]:
    """A line per training round that was finished after that moment."""
    run = run_of(events)
    name, metric = str(run.get("method", "")), str(run.get("metric", ""))
    for e in of_kind(events, "round", "train"):
        if not _after(e, since):
            continue
        before, after = e.get("before") or {}, e.get("after") or {}
        line = (
            f"{name} round {e['round']}/{run.get('rounds', '?')}: mean {metric} {_number(before.get('mean'))} -> "
            f"{_number(after.get('mean'))}, worst {_number(after.get('worst'))} ({after.get('worst_client') or NONE}), "
            f"{e['accepted']} of {e['sampled']} clients, {size(e['bytes_down'] + e['bytes_up'])}"
        )
        lost = [c for c in of_kind(events, "client", "train") if c["round"] == e["round"] and not c["accepted"]]
        reasons = [f"{c['client'] or 'node ' + str(c['node'])} {c['reason']}" for c in lost]
        yield printable("; ".join([line + ", VOID" * bool(e.get("void")), *reasons]))


def _page(
    events: Sequence[Event],
    now: datetime | None,
    names: tuple[str, str, str],
    rows: Sequence[Row],
    scores: Sequence[tuple[Event, Event]],
    notes: Sequence[str],
) -> RenderableType:
    """Header, clients, their scores, notes; `names` are those of the columns that differ."""
    old, new, last = names
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True, header_style="bold")
    grid.add_column("client", no_wrap=True, overflow="ellipsis", max_width=NAME)
    for column in (old, new, "change", "rows", "down", "up"):
        grid.add_column(column, justify="right", no_wrap=True, overflow="ellipsis")
    grid.add_column("trend", no_wrap=True, overflow="ellipsis")
    grid.add_column(last, no_wrap=True, overflow="ellipsis", ratio=1)
    better = 1 if run_of(events).get("higher_is_better", True) else -1
    end = max((max(track.shared, default=0) for track, *_ in rows), default=0)
    for track, before, after, said in rows:
        examples = NONE if track.examples is None else str(track.examples)
        sent = (examples, size(track.down), size(track.up), spark(track.shared, end))
        grid.add_row(Text(printable(track.name)), *_pair(before, after, better), *sent, said)
    blank = [""] * 4
    for was, now_is in scores:
        grid.add_row()
        for name, who in (("mean", ""), ("worst", printable(str(now_is.get("worst_client") or "")))):
            grid.add_row(Text(name, "bold"), *_pair(was.get(name), now_is.get(name), better), *blank, Text(who))
        percent = [_number(scored.get("delta_m"), "{:+.1f}%") for scored in (was, now_is)]
        grid.add_row(Text("delta-m", "bold"), *percent, "", *blank, Text("less is better", "dim"))
    lines = [Text(printable(note), "red", overflow="ellipsis", no_wrap=True) for note in notes]
    return Group(_header(events, rows, now), grid, *lines)


def _header(events: Sequence[Event], rows: Sequence[Row], now: datetime | None) -> Text:
    run, down, up = run_of(events), sum(track.down for track, *_ in rows), sum(track.up for track, *_ in rows)
    parts = [
        f"{run['method']}",
        f"{last_round(events)}/{run['rounds']} rounds",
        str(timedelta(seconds=int(elapsed(events, now)))),
        f"{size(down)} down, {size(up)} up",
    ]
    if privacy := of_kind(events, "privacy"):
        parts.append(f"epsilon {_number(privacy[-1].get('epsilon'))} at delta {privacy[-1].get('delta')}")
    if events[-1]["event"] == "end":
        parts.append(": ".join(str(events[-1][key]) for key in ("status", "reason") if events[-1].get(key)))
    return Text(printable(" | ".join([*parts, str(run["metric"])])), "bold")


def elapsed(events: Sequence[Event], now: datetime | None = None) -> float:
    """Seconds the run took, without the time between a stop and a resumption."""
    times = [datetime.fromisoformat(event["time"]) for event in events]
    gaps = [b - a for a, b, event in zip(times, times[1:], events[1:]) if event["event"] != "run"]
    if now is not None and events and events[-1]["event"] != "end":
        gaps.append(now - times[-1])
    return sum(gaps, timedelta()).total_seconds()


def spark(series: Mapping[int, float], end: int) -> str:
    """A metric over the models of 0 to `end` rounds as blocks, lowest to highest; long series are thinned out."""
    steps = min(TREND, end + 1)
    picked = [round(i * end / max(steps - 1, 1)) for i in range(steps)]
    low, high = min(series.values(), default=0.0), max(series.values(), default=0.0)
    height = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((series[i] - low) * height)] if i in series else GAP for i in picked)


def _number(value: float | None, form: str = "{:.3f}") -> str:
    if value is None:
        return NONE
    return form.format(value) if abs(value) < 1000 else f"{value:.1e}"


def _pair(old: float | None, new: float | None, better: int) -> tuple[str, str, Text]:
    """Two values and their difference, green where it went the better way (1: up, -1: down)."""
    if old is None or new is None:
        return _number(old), _number(new), Text(NONE)
    gain = (new - old) * better
    colour = "green" if gain > 0 else "red" if gain < 0 else ""
    return _number(old), _number(new), Text(_number(new - old, "{:+.3f}"), colour)


def plot(events: Sequence[Event], path: str | os.PathLike[str]) -> Path:
    """Draw a run as the PNG file `path`: metric and bytes over the rounds; of many clients the worst is named."""
    plotting.check_matplotlib(f"the figures need matplotlib: {install('federated')}")
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
    """Rounds behind the model -> mean of the clients' last known values: a lost reply is neither a gain nor a loss."""
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
