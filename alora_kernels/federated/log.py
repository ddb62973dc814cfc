"""What happened in a run: the ledger, one JSON object a line, which `server` alone writes, and what its events say.

Readers may come at any time: each line goes out in one write, a failed write is taken back, and a resumed run cuts the
file by an atomic rename.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import files

Event = Mapping[str, Any]
LEDGER = "ledger.jsonl"  # in the output folder
NO_REPLY = "no reply"  # how the guard's reason begins when a client was silent


class Ledger:
    """Appends events to one file.

    "round" events get the `scores` of the accepted clients' main metric: under "before" and "after" for training, under
    "metrics" for an evaluation. The baseline is "before" of the first training round, the untuned model. Without a
    "run" event, which names the metric, there are no scores.

    `resume_from=k` keeps what an earlier process wrote up to round k, no more.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_from: int | None = None) -> None:
        self.path = Path(path)
        self._events = [] if resume_from is None else _cut(self.path, resume_from)  # what is in the file
        # "a": after a failed write is cut off, the next goes to the new end; unbuffered: one write call per line
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def write(self, event: Event) -> None:
        """Append one event of JSON values and NumPy scalars, with the time; an OSError leaves the file as it was."""
        if not isinstance(event.get("event"), str):
            raise ValueError(f"an event needs its name under 'event', got {sorted(map(str, event))}")
        time = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line = _plain({**time, **event, **self._scores(event), **time})
        self._append(_encode(line), sync=event["event"] != "client")
        self._events.append(line)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _scores(self, event: Event) -> dict[str, Any]:
        run = run_of(self._events)
        if event["event"] != "round" or run.get("metric") is None:
            return {}
        trained = of_kind(self._events, "client", "train")
        baseline = measured((e for e in trained if e["round"] == trained[0]["round"]), "before", run["metric"])
        clients = [e for e in of_kind(self._events, "client", event["kind"]) if e["round"] == event["round"]]
        return {
            name: scores(measured(clients, name, run["metric"]), baseline, run.get("higher_is_better", True))
            for name in (("before", "after") if event["kind"] == "train" else ("metrics",))
        }

    def _append(self, line: bytes, *, sync: bool) -> None:
        start = os.fstat(self._file.fileno()).st_size
        try:
            if (written := self._file.write(line)) != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes fitted")
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            try:
                self._file.truncate(start)
            except OSError:
                self._file.close()  # no whole line may follow half a one
            why = f"the ledger could not be written ({error.strerror}): make room, then continue with --resume"
            raise OSError(error.errno, why, str(self.path)) from error


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a ledger in the order of their writing, of a run in progress too.

    Half a last line, which a running or killed process leaves, is left out; any other that is no event is a ValueError.
    """
    lines, events = Path(path).read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line.decode("ascii"), parse_constant=_refuse)
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError("an object with a name under 'event' is expected")
            events.append(event)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is no event of a ledger: {error}") from None
    return events


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _encode(event: Event) -> bytes:
    return json.dumps(event, allow_nan=False).encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    """NumPy's scalars as numbers, and null for what is not finite: strict JSON has no NaN."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, last: int) -> list[dict[str, Any]]:
    """Drop what came after a round, by an atomic rename, and return the rest."""
    events = read(path)
    reached = last_round(events)
    if not 0 <= last <= reached:
        raise ValueError(f"resume_from={last}, but {path} has rounds 1 to {reached}: resume with the run's own ledger")
    kept = [e for e in events if _stays(e, last)]
    while kept and kept[-1]["event"] == "client":
        kept.pop()  # their round never got its closing line, so it is played again
    with files.replacing(path) as draft, open(draft, "wb") as file:
        file.writelines(map(_encode, kept))
        file.flush()
        os.fsync(file.fileno())
    return kept


def _stays(event: Event, last: int) -> bool:
    """Whether an event came before the checkpoint of that round; an evaluation of the round comes after it."""
    number = event.get("round") or event.get("resumed_at") or 0
    return event["event"] != "end" and number + (event.get("kind") == "evaluate") <= last


def of_kind(events: Iterable[Event], name: str, kind: str | None = None) -> list[Event]:
    """The events with that name, of training ("train") or evaluation alone where a kind is given."""
    return [event for event in events if event["event"] == name and (kind is None or event["kind"] == kind)]


def run_of(events: Sequence[Event]) -> Event:
    """The newest "run" event (a resumed run has several), or an empty one."""
    return (of_kind(events, "run") or [{}])[-1]


def last_round(events: Iterable[Event]) -> int:
    """The last round that was closed; 0 before the first."""
    return max((e["round"] for e in of_kind(events, "round")), default=0)


def measured(clients: Iterable[Event], field_name: str, metric: str) -> dict[str, float]:
    """Client -> the metric in one field ("before", "after", "metrics") of the accepted client events."""
    found = {e["client"]: (e.get(field_name) or {}).get(metric) for e in clients if e["accepted"]}
    return {name: value for name, value in found.items() if value is not None}


def delta_m(values: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: bool = True) -> float | None:
    """Mean relative change against a baseline, in percent. NEGATIVE IS BETTER.

    Formula: `100/K sum_k (-1)^h (M_k - M0_k) / M0_k`, h = 1 if higher is better, else 0 (Ban & Ji 2025, Fed-ALoRA), for
    client k's metric M and its baseline M0, which may have more clients. None where a relative change means nothing:
    M0 is not above zero, or a number is not finite.
    """
    if not values:
        raise ValueError("values is empty: delta_m needs at least one client")
    if missing := sorted(set(values) - set(baseline)):
        raise ValueError(f"baseline has no value for {', '.join(missing)}: leave them out of values")
    pairs = [(values[name], baseline[name]) for name in values]
    if not all(math.isfinite(new) and math.isfinite(old) and old > 0 for new, old in pairs):
        return None
    sign = -1 if higher_is_better else 1
    return sign * 100 * math.fsum((new - old) / old for new, old in pairs) / len(pairs) + 0.0  # no -0.0


def scores(values: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: bool = True) -> dict[str, Any]:
    """Scores of several clients, as a "round" event holds them; None where there is nothing to say.

    "delta_m" is over the "delta_m_clients" clients with a baseline: who joined later has none.
    """
    if not values:
        return dict.fromkeys(("mean", "worst", "worst_client", "delta_m")) | {"delta_m_clients": 0}
    worst = (min if higher_is_better else max)(sorted(values), key=lambda name: values[name])
    based = {name: value for name, value in values.items() if name in baseline}
    return {
        "mean": math.fsum(values.values()) / len(values),
        "worst": values[worst],
        "worst_client": worst,
        "delta_m": delta_m(based, baseline, higher_is_better) if based else None,
        "delta_m_clients": len(based),
    }


@dataclass
class Track:
    """One client over the rounds."""

    name: str  # "node 7" when it never gave one
    shared: dict[int, float] = field(default_factory=dict)  # rounds behind the model -> metric: k before round k + 1
    local: dict[int, float] = field(default_factory=dict)  # round -> metric after local training
    nbytes: Counter[int] = field(default_factory=Counter)  # round -> bytes of its training, no evaluation
    down: int = 0  # bytes in all, of training and evaluation, as is `up`
    up: int = 0
    examples: int | None = None  # rows it trains on
    rejected: list[tuple[int, str]] = field(default_factory=list)  # (round, reason), silence included
    seen: int = 0  # last round it was asked
    accepted: int = 0  # last round it was accepted

    @property
    def reasons(self) -> Counter[str]:
        """Reason -> how often it was rejected for it."""
        return Counter(reason for _, reason in self.rejected)

    def add(self, event: Event, metric: str) -> None:
        """Take in one "client" event."""
        number, down, up = event["round"], event.get("bytes_down") or 0, event.get("bytes_up") or 0
        self.seen = number
        self.down, self.up = self.down + down, self.up + up
        if event["kind"] == "train":
            self.nbytes[number] += down + up
        if not event["accepted"]:
            self.rejected.append((number, str(event.get("reason"))))
            return
        self.accepted = number
        if event["kind"] == "train":
            self.examples = event.get("examples")
        fields = ("before", self.shared, number - 1), ("after", self.local, number), ("metrics", self.shared, number)
        for name, series, step in fields:
            value = (event.get(name) or {}).get(metric)
            if value is not None:
                series[step] = value

    def state(self, last: int) -> str:
        """ "ok", "waiting" (never asked), "not asked" (this round), "no reply", or "rejected: why"."""
        if self.seen < max(last, 1):
            return "not asked" if self.seen else "waiting"
        if self.accepted == self.seen:
            return "ok"
        reason = self.rejected[-1][1]
        return NO_REPLY if reason.startswith(NO_REPLY) else f"rejected: {reason}"


def tracks(events: Sequence[Event]) -> list[Track]:
    """A track of every client, those the run announced first.

    A node counts as the client it was accepted as. A name that is only claimed, in a reply that was rejected, counts
    where no other node has it: nobody collects rejections in another's name.
    """
    run, clients = run_of(events), of_kind(events, "client")
    nodes = {event["node"]: event["client"] for event in clients if event["accepted"]}
    owned = set(nodes.values())
    found = {name: Track(name) for name in run.get("clients") or ()}
    for event in clients:
        claimed = event.get("client")
        name = nodes.get(event["node"]) or (claimed if claimed not in owned else None) or f"node {event['node']}"
        found.setdefault(name, Track(name)).add(event, run.get("metric", ""))
    return list(found.values())


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    status: str  # "finished", or "stopped" with everything up to the last round saved
    reason: str | None  # why it stopped
    rounds: int  # completed
    arrays: dict[str, NDArray] = field(repr=False)  # the shared ones after the last of them
    events: list[dict[str, Any]] = field(repr=False)  # the whole ledger

    @property
    def final(self) -> dict[str, dict[str, float]]:
        """Client -> metrics of the final shared arrays with its private half, on its own test data."""
        return {e["client"]: e["metrics"] for e in self._clients("evaluate") if e["accepted"]}

    @property
    def rejections(self) -> list[Event]:
        """The events of replies that were not used."""
        return [e for e in self._clients("train") if not e["accepted"]]

    @property
    def bytes_up(self) -> int:
        """Bytes of arrays that clients sent, in all training rounds."""
        return sum(e["bytes_up"] for e in self._clients("train"))

    @property
    def bytes_down(self) -> int:
        """Bytes of arrays that were sent to clients, in all training rounds."""
        return sum(e["bytes_down"] for e in self._clients("train"))

    def _clients(self, kind: str) -> list[Event]:
        return of_kind(self.events, "client", kind)
