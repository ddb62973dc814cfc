"""What a ledger says: scores of a round, each client over the rounds, bytes and rejections.

In:   events of a ledger, as `ledger.read` returns them.
Out:  mean, worst client and delta-m of a round; a `Track` per client; `Totals`.
Who:  `ledger` adds scores to a round; `live` and `plot` draw tracks; the command line reports totals.

Train round k measures a client twice: "before" local training, on the model of k - 1 rounds, and "after" it. An
evaluation in round k measures the model of k rounds. A track keeps both under the rounds behind the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]
NO_REPLY = "no reply"  # how the guard's reason begins when a client was silent


def delta_m(values: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: bool = True) -> float | None:
    """Mean relative change against a baseline, in percent. NEGATIVE IS BETTER.

    Formula: `100/K sum_k (-1)^h (M_k - M0_k) / M0_k`, h = 1 if higher is better, else 0.

    Args:
        values: client -> metric M.
        baseline: client -> metric M0; it may have more clients.
        higher_is_better: as with accuracy; False as with a loss.

    Returns:
        Percent, or None where a relative change means nothing: M0 is not above zero, or a number is not finite.

    Raises:
        ValueError: no values, or a client without a baseline.

    Source: the multi-task measure of Ban & Ji 2025, Fed-ALoRA.
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
    """Scores of several clients, as a "round" event holds them.

    Args:
        values: client -> metric.
        baseline: client -> metric of the untuned model; a client that joined later has none.
        higher_is_better: as with accuracy.

    Returns:
        "mean", "worst", "worst_client", "delta_m" over the clients with a baseline, and their number
        "delta_m_clients"; None where there is nothing to say.
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


def measured(clients: Iterable[Event], field_name: str, metric: str) -> dict[str, float]:
    """Client -> the metric in one field ("before", "after", "metrics") of the accepted client events."""
    found = {e["client"]: (e.get(field_name) or {}).get(metric) for e in clients if e["accepted"]}
    return {name: value for name, value in found.items() if value is not None}


def of_kind(events: Iterable[Event], kind: str) -> list[Event]:
    """The events with that name."""
    return [event for event in events if event["event"] == kind]


def run_of(events: Sequence[Event]) -> Event:
    """The newest "run" event (a resumed run has several), or an empty one."""
    return (of_kind(events, "run") or [{}])[-1]


@dataclass
class Track:
    """One client over the rounds.

    Attributes:
        name: the client's name, or "node 7" when it never gave one.
        shared: rounds behind the model -> metric before local training, or in an evaluation.
        local: round -> metric after local training.
        nbytes: round -> bytes down and up of its training; the last evaluation would be a kink in every curve.
        down, up: bytes in all.
        examples: rows it trains on.
        rejected: (round, reason) of everything from it that was not accepted, silence included.
        seen, accepted: the last round it was asked, and the last it was accepted.
    """

    name: str
    shared: dict[int, float] = field(default_factory=dict)
    local: dict[int, float] = field(default_factory=dict)
    nbytes: Counter[int] = field(default_factory=Counter)
    down: int = 0
    up: int = 0
    examples: int | None = None
    rejected: list[tuple[int, str]] = field(default_factory=list)
    seen: int = 0
    accepted: int = 0

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
        if event["kind"] == "evaluate":
            _put(self.shared, number, event, "metrics", metric)
        else:
            _put(self.shared, number - 1, event, "before", metric)
            _put(self.local, number, event, "after", metric)
            self.examples = event.get("examples")

    def state(self, last_round: int) -> str:
        """ "ok", "waiting" (never asked), "not asked" (this round), "no reply", or "rejected: why"."""
        if self.seen < max(last_round, 1):
            return "not asked" if self.seen else "waiting"
        if self.accepted == self.seen:
            return "ok"
        reason = self.rejected[-1][1]
        return NO_REPLY if reason.startswith(NO_REPLY) else f"rejected: {reason}"


def _put(series: dict[int, float], key: int, event: Event, field_name: str, metric: str) -> None:
    value = (event.get(field_name) or {}).get(metric)
    if value is not None:
        series[key] = value


def tracks(events: Sequence[Event]) -> dict[str, Track]:
    """Name -> track of every client, those the run announced first.

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
    return found


@dataclass(frozen=True)
class Totals:
    """Bytes and rejections of a run.

    Attributes:
        down, up: client -> bytes in all.
        rejections: client -> reason -> how often.
    """

    down: dict[str, int]
    up: dict[str, int]
    rejections: dict[str, dict[str, int]]

    @property
    def nbytes(self) -> int:
        """Bytes of all clients in both directions."""
        return sum(self.down.values()) + sum(self.up.values())


def totals(events: Sequence[Event]) -> Totals:
    """Bytes per client and rejections per client and reason, of training and evaluation together."""
    found = tracks(events).values()
    return Totals(
        down={t.name: t.down for t in found},
        up={t.name: t.up for t in found},
        rejections={t.name: dict(Counter(reason for _, reason in t.rejected)) for t in found if t.rejected},
    )
