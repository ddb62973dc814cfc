"""A grid that lets in only what was agreed: between any Flower strategy and any Flower grid.

From a strategy's messages to the accepted replies, sorted by client name, and one event per message and per round.
`server` wraps its grid; strategies and Flower's privacy wrappers stay as they are.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import Grid

from . import wire
from .config import Limits

log = logging.getLogger("alora_kernels.federated")
REASON = 300  # characters of a reason: it may quote what a client sent
NAME = 100  # characters of a client's name


class QuorumError(RuntimeError):
    """Too few clients for too long; the message says how many, how long, and what to change."""


class GuardedGrid:
    """A grid whose replies are checked; everything else goes to the inner grid, which transports.

    `run` is the run's name, told to the clients; `on_event` gets each event, a flat dictionary ready for JSON; `clock`
    gives seconds that only grow.
    """

    def __init__(
        self,
        grid: Grid,
        spec: wire.WireSpec,
        limits: Limits,
        *,
        run: str,
        on_event: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid, self._spec, self._limits, self._name = grid, spec, limits, run
        self._on_event, self._clock = on_event, clock
        self._clients: dict[int, str] = {}
        self._void_rounds, self._any_good = 0, False
        self.nothing_done: QuorumError | None = None  # why a run is not finished if all its rounds were void
        self._most_nodes, self._waiting_since = -1, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_node_ids(self) -> list[int]:
        """Ids of the connected nodes, sorted.

        Flower's strategies ask once per second, for ever, while there are too few. So the wait ends here: QuorumError
        when they have asked for longer than the deadline since the last round, or since the last node came.
        """
        ids, now = sorted(self._grid.get_node_ids()), self._clock()
        if len(ids) > self._most_nodes:
            self._most_nodes, self._waiting_since = len(ids), now
        elif now - self._waiting_since > self._limits.deadline:
            raise QuorumError(
                f"{len(ids)} nodes are connected and no further one came in {now - self._waiting_since:.0f} s (a round "
                f"needs {self._limits.quorum} replies): start more clients, ask for fewer nodes or raise the deadline"
            )
        return ids

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send one round's messages, at most one to a node, and return the replies that pass, by client name.

        Each holds the dense arrays (train) and the metrics. Refused ones are dropped, not passed on as errors: Flower's
        privacy wrappers throw a whole round away for one error, so a single bad client could stop everybody. A training
        round with fewer than the quorum is void and returns none; one void round too many raises QuorumError. The
        limits' deadline holds when it is shorter than `timeout`, in seconds.
        """
        begin = self._clock()
        current = _Round.of(messages, self._spec, self._limits, self._name)
        if current is None:
            return []
        limit = self._limits.deadline if timeout is None else min(timeout, self._limits.deadline)
        replies = self._grid.send_and_receive([sent.message for sent in current.sent.values()], timeout=limit)
        current.receive(replies, self._clients, limit)
        void = current.kind == "train" and len(current.accepted) < self._limits.quorum
        for event in current.events(void=void, seconds=self._clock() - begin):
            self._on_event(event)
        self._most_nodes = -1
        if void:
            self._void(current)
            return []
        if current.kind == "train":
            self._void_rounds, self._any_good, self.nothing_done = 0, True, None
        return [make_message(metadata=sent.reply.metadata, content=sent.content) for sent in current.accepted]

    def _void(self, current: _Round) -> None:
        self._void_rounds += 1
        counts = f"{len(current.accepted)} of {len(current.sent)} replies accepted, {self._limits.quorum} needed"
        log.warning("round %d is void: %s", current.number, counts)
        events = [entry.event for entry in current.entries if entry.content is None]
        refused = [f"{event['client'] or 'node ' + str(event['node'])}: {event['reason']}" for event in events]
        shown = "; ".join(refused[:5]) + (f"; and {len(refused) - 5} more" if len(refused) > 5 else "")
        error = QuorumError(
            f"{self._void_rounds} rounds in a row without a quorum, the last one (round {current.number}) with "
            f"{counts} within {self._limits.deadline:g} s: mend the clients named here, or lower the quorum. "
            f"{shown or 'Every reply was accepted: sample more nodes'}"
        )
        if self._void_rounds >= self._limits.patience:
            raise error
        self.nothing_done = None if self._any_good else error


@dataclass
class _Entry:
    """One message and what came of it; a reply nobody waits for gets one of its own, without a message."""

    event: dict[str, Any]  # what the ledger hears of it: "client" and "seconds" as the reply says, "reason" if refused
    message: Any = None
    nonce: str = ""
    arrays: wire.NDArrays = field(default_factory=dict)  # what was sent
    reply: Any = None
    content: RecordDict | None = None  # the checked metrics and, in training, dense arrays: what a strategy gets

    def came(self, reply: Message) -> None:
        """Note what a reply says of itself, unchecked but for its types."""
        self.reply = reply
        if not reply.has_content():
            return
        self.event["bytes_up"] = _bytes_that_came(reply.content)
        config = reply.content.get(wire.REPLY)
        if isinstance(config, ConfigRecord):
            name, seconds = config.get(wire.CLIENT), config.get(wire.SECONDS)
            if isinstance(name, str) and 0 < len(name) <= NAME and name.isprintable():
                self.event["client"] = name
            if wire.finite(seconds):
                self.event["seconds"] = float(cast(float, seconds))


@dataclass
class _Round:
    """The messages of one round by node, and replies that belong to none of them.

    The first check that fails gives the reason, so what is cheap and names the cause comes first: an old client's reply
    is refused for its spec hash, not because "keys differ". Plain averaging would take NaN, 1e30, negative weights and
    shapes that merely broadcast.
    """

    kind: str
    number: int
    spec: wire.WireSpec
    limits: Limits
    sent: dict[int, _Entry] = field(default_factory=dict)
    extra: list[_Entry] = field(default_factory=list)

    @classmethod
    def of(cls, messages: Iterable[Message], spec: wire.WireSpec, limits: Limits, run: str) -> _Round | None:
        """A strategy's messages of one round made anew, each with the run's name, the spec's digest and its own nonce.

        Anew, because strategies put one and the same RecordDict into all of them.
        """
        messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        if not messages:
            return None
        metadata, said = messages[0].metadata, messages[0].content.config_records[wire.CONFIG]
        record = messages[0].content.array_records[wire.ARRAYS]
        arrays, current = (
            wire.from_record(record, spec),
            cls(metadata.message_type, cast(int, said[wire.ROUND]), spec, limits),
        )
        size = sum(values.nbytes for values in arrays.values())
        for node in (message.metadata.dst_node_id for message in messages):
            nonce = secrets.token_hex(16)
            config = ConfigRecord({**said, wire.RUN: run, wire.SPEC: spec.digest, wire.NONCE: nonce})
            content = RecordDict({wire.ARRAYS: record, wire.CONFIG: config})
            fresh = Message(content, node, current.kind, ttl=metadata.ttl, group_id=str(current.number))
            current.sent[node] = _Entry(current._event(node, size), fresh, nonce, arrays)
        return current

    def _event(self, node: int, bytes_down: int = 0) -> dict[str, Any]:
        """The event of a node that has not answered."""
        return {
            "event": "client",
            "kind": self.kind,
            "round": self.number,
            "node": node,
            "client": None,
            "accepted": False,
            "reason": None,
            "bytes_down": bytes_down,
            "bytes_up": 0,
            "examples": None,
            "seconds": None,
            **{name: {} for name in wire.MEASURED[self.kind]},
        }

    @property
    def entries(self) -> list[_Entry]:
        """All that the ledger hears of: each message, then the replies that answer none."""
        return [*self.sent.values(), *self.extra]

    @property
    def accepted(self) -> list[_Entry]:
        """What passed, by client name: float sums then do not depend on who was first."""
        return sorted((sent for sent in self.sent.values() if sent.content), key=lambda sent: sent.event["client"])

    def receive(self, replies: Iterable[Message], names: dict[int, str], limit: float) -> None:
        """Hold whatever came to the checks, by node id; `names`, node -> client of earlier rounds, learns from it."""
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            entry, reason = self._place(reply)
            entry.came(reply)
            try:
                if reason is not None:
                    raise wire.WireError(reason)
                entry.content = self._checked(entry)
            except Exception as error:  # whatever a reply does to the checks, it is that reply that is wrong
                said = str(error) if isinstance(error, wire.WireError) else f"{type(error).__name__}: {error}"
                entry.event["reason"] = _short(said)
        for event, content in ((entry.event, entry.content) for entry in self.entries):
            if content is not None:
                names[event["node"]] = event["client"]
                event |= {"accepted": True, **self._measured(content)}
                continue
            event["client"] = event["client"] or names.get(event["node"])
            event["reason"] = event["reason"] or f"no reply within {limit:g} s"
            facts = (event["client"], event["node"], self.number, event["reason"])
            log.warning("refused client %s, node %d, round %d: %s", *facts)

    def _measured(self, content: RecordDict) -> dict[str, Any]:
        metrics = dict(content.metric_records[wire.METRICS])
        examples = metrics.pop(wire.EXAMPLES)
        return {"examples": examples} | {
            name: {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
            for name, prefix in wire.MEASURED[self.kind].items()
        }

    def _place(self, reply: Message) -> tuple[_Entry, str | None]:
        """The message a reply answers, or an entry of its own; and why it cannot count, before its content is read.

        A late or a further reply is reported by itself and takes nothing from its node.
        """
        node, answers = reply.metadata.src_node_id, reply.metadata.reply_to_message_id
        reason = None
        if reply.has_error():
            lines = (reply.error.reason or "").strip().splitlines()
            reason = lines[-1].strip() if lines else f"error {reply.error.code} without a reason"
        sent = self.sent.get(node)
        if sent is None and reason is not None:  # Flower answers for nodes it lost, from an id that is not theirs
            sent = next((each for each in self.sent.values() if each.message.metadata.message_id == answers), None)
        if sent is not None and sent.reply is None and answers == sent.message.metadata.message_id:
            return sent, reason
        if reason is None:
            if sent is None:
                reason = f"node {node} was not asked in this round"
            elif sent.reply is not None:
                reason = "second reply of this node in this round; the first one counts"
            else:
                reason = "late: it does not answer the message of this round"
        self.extra.append(_Entry(self._event(node)))
        return self.extra[-1], reason

    def _checked(self, entry: _Entry) -> RecordDict:
        """The checked records of a reply, or WireError with the reason."""
        content = entry.reply.content
        expected: dict[str, type] = {wire.METRICS: MetricRecord, wire.REPLY: ConfigRecord}
        if self.kind == "train":
            expected[wire.ARRAYS] = ArrayRecord
        for name in sorted(set(content) | set(expected)):
            if name not in expected or not isinstance(content.get(name), expected[name]):
                state = "lacks" if name not in content else "has an unexpected"
                agreed = ", ".join(expected)
                raise wire.WireError(
                    f"{state} record {_short(name, 50)!r}; the reply of this {self.kind} round has exactly {agreed}"
                )
        if content[wire.REPLY].get(wire.NONCE) != entry.nonce:
            raise wire.WireError("nonce is not the one this message was sent with: an old or a forged reply")
        if content[wire.REPLY].get(wire.SPEC) != self.spec.digest:
            raise wire.WireError(
                "spec hash differs: the client has another method, base model, scaling or seed, other arrays or metrics"
            )
        if (client := entry.event["client"]) is None:
            raise wire.WireError(f"{wire.CLIENT} must be a printable name of 1 to {NAME} characters")
        checked = RecordDict({wire.METRICS: self._metrics(content[wire.METRICS])})
        if self.kind == "train":
            checked[wire.ARRAYS] = self._arrays(content[wire.ARRAYS], entry.arrays)
        for other in (other.event for other in self.accepted):
            if other["client"] == client:
                raise wire.WireError(f"client name {client!r} is taken by node {other['node']} in this round")
        return checked

    def _metrics(self, record: MetricRecord) -> MetricRecord:
        wire.check_keys(set(record), self.spec.metric_keys(self.kind), "metrics")
        for key in sorted(record):
            if not isinstance(record[key], int | float):
                raise wire.WireError(f"{key} is a list, agreed is one number")
            if not wire.finite(record[key]):
                raise wire.WireError(f"{key} is {record[key]}, not a finite number")
        examples = cast(float, record[wire.EXAMPLES])
        if not 0 < examples <= self.limits.max_examples:
            raise wire.WireError(f"{wire.EXAMPLES} is {examples}, outside (0, {self.limits.max_examples}]")
        return MetricRecord({key: record[key] for key in sorted(record)})

    def _arrays(self, record: ArrayRecord, sent: wire.NDArrays) -> ArrayRecord:
        dense, arrays = wire.expand(record, self.spec, sent)
        if (key := wire.not_finite(arrays)) is not None:
            raise wire.WireError(f"{key} has values that are not finite")
        with np.errstate(over="ignore", invalid="ignore"):  # in float64 1e30 squared is a number, or inf
            squares = [np.square(np.subtract(arrays[key], sent[key], dtype=np.float64)).sum() for key in sent]
        norm, cap = math.sqrt(sum(map(float, squares))), self.limits.norm_cap
        cap = math.sqrt(sum(values.size for values in sent.values())) if cap is None else cap
        if not norm <= cap:
            raise wire.WireError(f"L2 norm of the update is {norm:.3g}, the cap is {cap:.3g}")
        return dense

    def events(self, *, void: bool, seconds: float) -> list[dict[str, Any]]:
        """One event per message sent, one per reply that belongs to none, one for the round, ready for JSON.

        `rejected` counts client events that are not accepted, so a second reply of an accepted node counts as well;
        bytes include what was refused.
        """
        clients = [entry.event for entry in self.entries]
        accepted = len(self.accepted)
        closing = {
            "event": "round",
            "kind": self.kind,
            "round": self.number,
            "sampled": len(self.sent),
            "accepted": accepted,
            "rejected": len(clients) - accepted,
            "void": void,
            **{way: sum(event[way] for event in clients) for way in ("bytes_down", "bytes_up")},
            "seconds": seconds,
        }
        return [*clients, closing]


def _short(text: str, length: int = REASON) -> str:
    """One printable line: a client's words must not write lines of their own into a log."""
    return "".join(c if c.isprintable() else " " for c in text[:length])


def _bytes_that_came(content: RecordDict) -> int:
    """Bytes of the numbers in a reply; where declared shapes lie, the bytes there are."""
    arrays = [array for record in content.array_records.values() for array in record.values()]
    data = sum(len(array.data) for array in arrays)
    try:
        declared = sum(wire.nbytes(array.dtype, array.shape) for array in arrays)
    except Exception:  # a dtype may be any text, a dimension any integer
        return data
    return declared if 0 <= declared <= data else data
