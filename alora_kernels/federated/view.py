"""A run while it happens, as a table in the terminal: every client's metric, bytes and state.

In:   events of a ledger, or its path.
Out:  rich renderables; on something that is not a terminal, one plain line per finished round.
Who:  the command line, beside a run in this process or for a run in another one.

What clients wrote (names, reasons) is shown without control characters and without markup: a client must not move
another's cursor. A table fits 80 columns with accuracies and eight-digit byte counts in kB, MB, GB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .log import read
from .summary import Event, Track, of_kind, run_of, totals, tracks

BLOCKS = "▁▂▃▄▅▆▇█"
GAP = "·"  # a round without a value
TREND = 8  # columns of a sparkline
NAME = 14  # columns of a client's name
SHOWN = 4  # reasons below a table
NONE = "-"


def table(events: Sequence[Event], *, now: datetime | None = None) -> RenderableType:
    """The run so far.

    Args:
        events: a ledger's, `ledger.read`.
        now: to count the time until; None for the last event.

    Returns:
        A header (method, round, time, bytes, epsilon), a row per client with the metric before and after its last
        local training, bytes so far, state and trend, the clients' mean, worst and delta-m, and why replies of the
        last round were rejected.
    """
    run = run_of(events)
    if not run:
        return Text("waiting for the run to begin")
    last = _last_round(events)
    found = tracks(events)
    grid = _grid(("client", "before", "after", "change", "rows", "down", "up", "trend", "state"))
    for track in found.values():
        before, after = track.shared.get(_trained(track) - 1), track.local.get(_trained(track))
        grid.add_row(*_row(track, [before, after], run, _end(found.values())), _state(track.state(last)))
    done = [e for e in of_kind(events, "round") if e["kind"] == "train"]
    if done:
        _foot(grid, done[-1].get("before") or {}, done[-1].get("after") or {}, run, blanks=4)
    return Group(_header(events, run, last, now), grid, *_reasons(found.values(), last))


def summary(events: Sequence[Event]) -> RenderableType:
    """The finished run: untuned against final metric of each client, bytes in all, and rejections.

    Args:
        events: a ledger's, `ledger.read`.
    """
    run = run_of(events)
    if not run:
        return Text("the ledger holds no run")
    found, count = tracks(events), totals(events)
    grid = _grid(("client", "untuned", "final", "change", "rows", "down", "up", "trend", "rejected"))
    ends = [e for e in of_kind(events, "round") if e["kind"] == "evaluate"]
    judged = ends[-1]["round"] if ends else None
    for track in found.values():
        final = None if judged is None else track.shared.get(judged)
        number = sum(count.rejections.get(track.name, {}).values())
        row = _row(track, [track.shared.get(0), final], run, _end(found.values()))
        grid.add_row(*row, Text(str(number), "red" if number else ""))
    first = [e for e in of_kind(events, "round") if e["kind"] == "train"][:1]
    if first:
        final_scores = (ends[-1].get("metrics") or {}) if ends else {}
        _foot(grid, first[0].get("before") or {}, final_scores, run, blanks=4)
    notes = [
        Text(clean(f"{name}: {number} x {reason}"), "red", overflow="ellipsis", no_wrap=True)
        for name, reasons in count.rejections.items()
        for reason, number in reasons.items()
    ]
    return Group(_header(events, run, _last_round(events), None), grid, *notes)


def watch(
    path: str | Path,
    *,
    until: Callable[[], bool] | None = None,
    console: Console | None = None,
    interval: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
    since: datetime | None = None,
) -> list[dict[str, Any]]:
    """Show a ledger while it grows.

    Args:
        path: the file; it may not be there yet.
        until: stop when this is true; None for the ledger's "end" event.
        console: where to; standard output by default.
        interval: seconds between looks at the file.
        sleep: waits for them.
        since: nothing is shown until a run begins after this moment, nor lines of rounds before it.

    Returns:
        The events at the end.

    Raises:
        ValueError: the file is damaged.
    """
    console = console or Console()
    if not console.is_terminal or console.is_dumb_terminal:
        return _watch_plainly(_looks(Path(path), until, interval, sleep, since), console, since)
    events: list[dict[str, Any]] = []
    with Live(table(events), console=console, auto_refresh=False, transient=False) as view:
        for events in _looks(Path(path), until, interval, sleep, since):
            view.update(table(events, now=datetime.now(UTC)), refresh=True)
        view.update(table(events), refresh=True)
    return events


def _looks(
    path: Path,
    until: Callable[[], bool] | None,
    interval: float,
    sleep: Callable[[float], None],
    since: datetime | None,
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
        sleep(interval)


def _after(event: Event, since: datetime | None) -> bool:
    return since is None or datetime.fromisoformat(event["time"]) >= since


def _watch_plainly(
    looks: Iterable[list[dict[str, Any]]], console: Console, since: datetime | None
) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    printed = 0
    for events in looks:
        lines = list(_lines(events, since))
        for line in lines[printed:]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        printed = len(lines)  # a resumed run may have cut the file
    return events


def _lines(events: Sequence[Event], since: datetime | None) -> Iterator[str]:
    """A line per training round that was finished after that moment."""
    run = run_of(events)
    name, metric = str(run.get("method", "")), str(run.get("metric", ""))
    for e in of_kind(events, "round"):
        if e["kind"] != "train" or not _after(e, since):
            continue
        before, after = e.get("before") or {}, e.get("after") or {}
        line = (
            f"{name} round {e['round']}/{run.get('rounds', '?')}: mean {metric} {_number(before.get('mean'))} -> "
            f"{_number(after.get('mean'))}, worst {_number(after.get('worst'))} ({after.get('worst_client') or NONE}), "
            f"{e['accepted']} of {e['sampled']} clients, {size(e['bytes_down'] + e['bytes_up'])}"
        )
        lost = [c for c in of_kind(events, "client") if (c["kind"], c["round"]) == ("train", e["round"])]
        reasons = [f"{c['client'] or 'node ' + str(c['node'])} {c['reason']}" for c in lost if not c["accepted"]]
        yield clean("; ".join([line + ", VOID" * bool(e.get("void")), *reasons]))


def size(count: float) -> str:
    """12345678 as "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def spark(series: Mapping[int, float], end: int, width: int = TREND) -> str:
    """A metric over the models of 0 to `end` rounds as blocks, lowest to highest; long series are thinned out."""
    steps = min(width, end + 1)
    picked = [round(i * end / max(steps - 1, 1)) for i in range(steps)]
    low, high = min(series.values(), default=0.0), max(series.values(), default=0.0)
    height = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((series[i] - low) * height)] if i in series else GAP for i in picked)


def clean(text: str) -> str:
    """One line of printable characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def _grid(columns: Sequence[str]) -> Table:
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True, header_style="bold")
    for column in columns:
        edge = column in (columns[0], columns[-1])
        grid.add_column(
            column,
            justify="left" if edge or column == "trend" else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=NAME if column == columns[0] else None,
            ratio=1 if column == columns[-1] else None,
        )
    return grid


def _row(track: Track, values: Sequence[float | None], run: Event, end: int) -> list[RenderableType]:
    """All cells but the last."""
    return [
        Text(clean(track.name)),
        *map(_number, values),
        _change(*values, run=run),
        NONE if track.examples is None else str(track.examples),
        size(track.down),
        size(track.up),
        spark(track.shared, end),
    ]


def _foot(grid: Table, old: Event, new: Event, run: Event, *, blanks: int) -> None:
    grid.add_row()
    empty = [""] * blanks
    for name in ("mean", "worst"):
        pair = [old.get(name), new.get(name)]
        who = clean(str(new.get("worst_client") or "")) if name == "worst" else ""
        grid.add_row(Text(name, "bold"), *map(_number, pair), _change(*pair, run=run), *empty, Text(who))
    percent = [_number(scores.get("delta_m"), "{:+.1f}%") for scores in (old, new)]
    grid.add_row(Text("delta-m", "bold"), *percent, "", *empty, Text("less is better", "dim"))


def _header(events: Sequence[Event], run: Event, last: int, now: datetime | None) -> Text:
    count = totals(events)
    parts = [
        f"{run['method']}",
        f"{last}/{run['rounds']} rounds",
        str(timedelta(seconds=int(elapsed(events, now)))),
        f"{size(sum(count.down.values()))} down, {size(sum(count.up.values()))} up",
    ]
    if privacy := of_kind(events, "privacy"):
        parts.append(f"epsilon {_number(privacy[-1].get('epsilon'))} at delta {privacy[-1].get('delta')}")
    if events[-1]["event"] == "end":
        parts.append(": ".join(str(events[-1][key]) for key in ("status", "reason") if events[-1].get(key)))
    return Text(clean(" | ".join([*parts, str(run["metric"])])), "bold")


def elapsed(events: Sequence[Event], now: datetime | None = None) -> float:
    """Seconds the run took, without the time between a stop and a resumption."""
    total, begun, last = 0.0, None, None
    for event in events:
        moment = datetime.fromisoformat(event["time"])
        if event["event"] == "run":
            total, begun = total + ((last - begun).total_seconds() if begun and last else 0.0), moment
        last = moment
    if begun is None or last is None:
        return 0.0
    stop = last if now is None or events[-1]["event"] == "end" else now
    return total + (stop - begun).total_seconds()


def _reasons(found: Iterable[Track], last: int) -> list[RenderableType]:
    """Why replies of the last round were rejected."""
    lines = [f"round {n}, {track.name}: {reason}" for track in found for n, reason in track.rejected if n == last]
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [Text(clean(line), "red", overflow="ellipsis", no_wrap=True) for line in [*lines[:SHOWN], *more]]


def _last_round(events: Sequence[Event]) -> int:
    return max((e["round"] for e in of_kind(events, "round")), default=0)


def _trained(track: Track) -> int:
    return max(track.local, default=0)


def _end(found: Iterable[Track]) -> int:
    return max((max(track.shared, default=0) for track in found), default=0)


def _number(value: float | None, form: str = "{:.3f}") -> str:
    if value is None:
        return NONE
    return form.format(value) if abs(value) < 1000 else f"{value:.1e}"


def _change(old: float | None, new: float | None, *, run: Event) -> Text:
    if old is None or new is None:
        return Text(NONE)
    better = (new - old) * (1 if run.get("higher_is_better", True) else -1)
    return Text(_number(new - old, "{:+.3f}"), "green" if better > 0 else "red" if better < 0 else "")


def _state(state: str) -> Text:
    return Text(clean(state), {"ok": "green", "waiting": "dim", "not asked": "dim"}.get(state, "red"))
