"""A grid that lets in only what was agreed: between any Flower strategy and any Flower grid.

From a strategy's messages to the accepted replies with dense arrays, sorted by client name, and to one event per
message and per round. `server` wraps its grid; strategies and Flower's privacy wrappers stay as they are.

Strategies put one and the same RecordDict into all messages of a round, so each message is made anew before it gets a
nonce of its own. A node's reply counts if it answers this round's message and is the first to do so; a late or a
further reply is reported by itself and takes nothing from the node. Refused replies are dropped, not passed on as
errors: Flower's privacy wrappers throw a whole round away for one error, so a single bad client could stop everybody.
Nothing a client sends can raise out of here.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from . import wire
from .checks import Answer, Checks, Kind, RefusedError, bytes_that_came, client_name, short
from .config import Limits

log = logging.getLogger("alora_kernels.federated")


class QuorumError(RuntimeError):
    """Too few clients for too long; the message says how many, how long, and what to change."""


class GuardedGrid(Grid):
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
        self._checks = Checks(spec, limits.norm_cap, limits.max_examples)
        self._clients: dict[int, str] = {}
        self._void_rounds = 0
        self._last_void = ""
        self._good_rounds = 0
        self._most_nodes, self._waiting_since = -1, 0.0

    def set_run(self, run: Run) -> None:
        """Forwarded."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The inner grid's."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Forwarded."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Forwarded."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Forwarded, and not guarded."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Forwarded, and not guarded."""
        return self._grid.pull_messages(message_ids)

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

        Each holds the dense arrays (train) and the metrics. A training round with fewer than the quorum is void and
        returns none; one void round too many raises QuorumError. The limits' deadline holds when it is shorter than
        `timeout`, in seconds.
        """
        begin = self._clock()
        current = _stamp(messages, self._spec, self._name)
        if current is None:
            return []
        limit = self._limits.deadline if timeout is None else min(timeout, self._limits.deadline)
        outgoing = [cast(Message, sent.message) for sent in current.sent.values()]
        replies = self._grid.send_and_receive(outgoing, timeout=limit)
        current.receive(replies, self._checks, self._clients, limit)
        void = current.kind == "train" and len(current.accepted) < self._limits.quorum
        for event in current.events(void=void, seconds=self._clock() - begin):
            self._on_event(event)
        self._most_nodes = -1
        if void:
            self._void(current)
            return []
        if current.kind == "train":
            self._void_rounds = 0
            self._good_rounds += 1
        return current.replies()

    def _void(self, current: _Round) -> None:
        self._void_rounds += 1
        counts = f"{len(current.accepted)} of {len(current.sent)} replies accepted, {self._limits.quorum} needed"
        log.warning("round %d is void: %s", current.number, counts)
        refused = [f"{e.client or f'node {e.node}'}: {e.reason}" for e in current.entries if e.reason]
        shown = "; ".join(refused[:5]) + (f"; and {len(refused) - 5} more" if len(refused) > 5 else "")
        self._last_void = (
            f"{self._void_rounds} rounds in a row without a quorum, the last one (round {current.number}) with "
            f"{counts} within {self._limits.deadline:g} s: mend the clients named here, or lower the quorum. "
            f"{shown or 'Every reply was accepted: sample more nodes'}"
        )
        if self._void_rounds >= self._limits.patience:
            raise QuorumError(self._last_void)

    @property
    def nothing_done(self) -> QuorumError | None:
        """Why a run is not finished after its last round, if all its rounds were void."""
        return QuorumError(self._last_void) if self._last_void and not self._good_rounds else None


@dataclass
class _Sent:
    """One message and what came of it; a reply nobody waits for gets one of its own, without a message."""

    node: int  # whom it went to, or who replied
    message: Message | None = None
    nonce: str = ""
    arrays: wire.NDArrays = field(default_factory=dict)
    bytes_down: int = 0
    reply: Message | None = None  # the next three as it says, unchecked but for their types
    client: str | None = None
    seconds: float | None = None
    bytes_up: int = 0
    answer: Answer | None = None  # the checked content
    reason: str | None = None  # why there is none

    @property
    def message_id(self) -> str | None:
        """The id the grid gave the message."""
        return None if self.message is None else self.message.metadata.message_id

    def came(self, reply: Message) -> None:
        """Note what a reply says of itself."""
        self.reply = reply
        if not reply.has_content():
            return
        self.bytes_up = bytes_that_came(reply.content)
        config = reply.content.get(wire.REPLY)
        if isinstance(config, ConfigRecord):
            self.client = client_name(config)
            seconds = config.get(wire.SECONDS)
            self.seconds = float(cast(float, seconds)) if wire.finite(seconds) else None


@dataclass
class _Round:
    """The messages of one round by node, and replies that belong to none of them."""

    kind: Kind
    number: int
    sent: dict[int, _Sent] = field(default_factory=dict)
    extra: list[_Sent] = field(default_factory=list)

    @property
    def entries(self) -> list[_Sent]:
        """All that the ledger hears of: each message, then the replies that answer none."""
        return [*self.sent.values(), *self.extra]

    @property
    def accepted(self) -> list[_Sent]:
        """What passed, by client name: float sums then do not depend on who was first."""
        return sorted((sent for sent in self.sent.values() if sent.answer), key=lambda sent: sent.client or "")

    def receive(self, replies: Iterable[Message], checks: Checks, names: dict[int, str], limit: float) -> None:
        """Hold whatever came to the checks, by node id; `names`, node -> client of earlier rounds, learns from it."""
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            entry, reason = self._place(reply)
            entry.came(reply)
            try:
                if reason is not None:
                    raise RefusedError(reason)
                entry.answer = self._answer(entry, reply, checks)
                names[entry.node] = cast(str, entry.client)
            except Exception as error:  # whatever a reply does to the checks, it is that reply that is wrong
                known = isinstance(error, RefusedError | wire.WireError)
                entry.reason = short(str(error) if known else f"{type(error).__name__}: {error}")
        for entry in self.entries:
            entry.client = entry.client or names.get(entry.node)
            if entry.answer is None:
                entry.reason = entry.reason or f"no reply within {limit:g} s"
                log.warning(
                    "refused client %s, node %d, round %d: %s", entry.client, entry.node, self.number, entry.reason
                )

    def _place(self, reply: Message) -> tuple[_Sent, str | None]:
        """The message a reply answers, or an entry of its own; and why it cannot count, before its content is read."""
        node, answers = reply.metadata.src_node_id, reply.metadata.reply_to_message_id
        reason = _error_line(reply) if reply.has_error() else None
        sent = self.sent.get(node)
        if sent is None and reason is not None:  # Flower answers for nodes it lost, from an id that is not theirs
            sent = next((each for each in self.sent.values() if each.message_id == answers), None)
        if sent is not None and sent.reply is None and answers == sent.message_id:
            return sent, reason
        if reason is None:
            if sent is None:
                reason = f"node {node} was not asked in this round"
            elif sent.reply is not None:
                reason = "second reply of this node in this round; the first one counts"
            else:
                reason = "late: it does not answer the message of this round"
        self.extra.append(_Sent(node))
        return self.extra[-1], reason

    def _answer(self, entry: _Sent, reply: Message, checks: Checks) -> Answer:
        answer = checks.answer(self.kind, reply.content, entry.nonce, entry.arrays)
        for other in self.accepted:
            if other.client == entry.client:
                raise RefusedError(f"client name {entry.client!r} is taken by node {other.node} in this round")
        return answer

    def replies(self) -> list[Message]:
        """The accepted replies for a strategy: dense arrays (train) and metrics, nothing else."""
        messages = []
        for sent in self.accepted:
            answer, reply = cast(Answer, sent.answer), cast(Message, sent.reply)
            content = RecordDict({wire.METRICS: MetricRecord(dict(answer.metrics))})
            if answer.arrays is not None:
                content[wire.ARRAYS] = answer.arrays
            messages.append(make_message(metadata=reply.metadata, content=content))
        return messages

    def events(self, *, void: bool, seconds: float) -> list[dict[str, Any]]:
        """One event per message sent, one per reply that belongs to none, one for the round, ready for JSON.

        `rejected` counts client events that are not accepted, so a second reply of an accepted node counts as well;
        bytes include what was refused.
        """
        accepted = len(self.accepted)
        return [
            *map(self._client_event, self.entries),
            {
                "event": "round",
                "kind": self.kind,
                "round": self.number,
                "sampled": len(self.sent),
                "accepted": accepted,
                "rejected": len(self.entries) - accepted,
                "void": void,
                "bytes_down": sum(entry.bytes_down for entry in self.entries),
                "bytes_up": sum(entry.bytes_up for entry in self.entries),
                "seconds": seconds,
            },
        ]

    def _client_event(self, entry: _Sent) -> dict[str, Any]:
        metrics = dict(entry.answer.metrics) if entry.answer else {}
        examples = metrics.pop(wire.EXAMPLES, None)
        measured: dict[str, Any] = {"metrics": metrics}
        if self.kind == "train":
            measured = {
                name: {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
                for name, prefix in (("before", wire.BEFORE), ("after", wire.AFTER))
            }
        return {
            "event": "client",
            "kind": self.kind,
            "round": self.number,
            "node": entry.node,
            "client": entry.client,
            "accepted": entry.answer is not None,
            "reason": entry.reason,
            "bytes_down": entry.bytes_down,
            "bytes_up": entry.bytes_up,
            "examples": examples,
            "seconds": entry.seconds,
            **measured,
        }


def _error_line(reply: Message) -> str:
    lines = (reply.error.reason or "").strip().splitlines()
    return lines[-1].strip() if lines else f"error {reply.error.code} without a reason"


def _stamp(messages: Iterable[Message], spec: wire.WireSpec, run: str) -> _Round | None:
    """A round's messages made anew, each with the run's name, the spec's digest and its own nonce; None without any."""
    messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    kinds = {message.metadata.message_type for message in messages}
    if len(kinds) > 1 or not kinds <= {"train", "evaluate"}:
        raise ValueError(f"the guard sends rounds of 'train' or of 'evaluate' messages, got {', '.join(sorted(kinds))}")
    if not messages:
        return None
    numbers = {_round_number(message) for message in messages}
    if len(numbers) > 1:
        raise ValueError(f"messages of rounds {sorted(numbers)} in one call; send one round at a time")
    current = _Round(cast(Kind, kinds.pop()), numbers.pop())
    agreed: dict[int, wire.Agreed] = {}
    for message in messages:
        node = message.metadata.dst_node_id
        if node in current.sent:
            raise ValueError(f"two messages to node {node} in one round")
        record = message.content.array_records[wire.ARRAYS]
        if id(record) not in agreed:
            agreed[id(record)] = _as_agreed(record, spec)
        record, arrays = agreed[id(record)]
        nonce = secrets.token_hex(16)
        config = ConfigRecord(dict(message.content.config_records[wire.CONFIG]))
        config.update({wire.RUN: run, wire.SPEC: spec.digest, wire.NONCE: nonce, wire.ROUND: current.number})
        content = RecordDict({wire.ARRAYS: record, wire.CONFIG: config})
        fresh = Message(content, node, current.kind, ttl=message.metadata.ttl, group_id=str(current.number))
        current.sent[node] = _Sent(node, fresh, nonce, arrays, wire.payload_bytes(content))
    return current


def _round_number(message: Message) -> int:
    records = set(message.content)
    if records != {wire.ARRAYS, wire.CONFIG}:
        raise ValueError(
            f"a message has the records {sorted(records)}; give the strategy arrayrecord_key={wire.ARRAYS!r} and "
            f"configrecord_key={wire.CONFIG!r}"
        )
    number = message.content.config_records[wire.CONFIG].get(wire.ROUND)
    if not isinstance(number, int):
        raise ValueError(f"{wire.CONFIG} lacks an integer {wire.ROUND!r}, which Flower's strategies put there")
    return number


def _as_agreed(record: ArrayRecord, spec: wire.WireSpec) -> wire.Agreed:
    """What the server sends; other float types are cast, as Flower's FedOpt family answers float32 in float64."""
    wire.check_keys(set(record), set(spec.arrays))
    wanted = {key: dtype for key, (dtype, _) in spec.arrays.items()}
    if any(array.dtype != wanted[key] for key, array in record.items()):
        record = wire.to_record({k: a.numpy().astype(wanted[k], casting="same_kind") for k, a in record.items()})
    return wire.Agreed(record, wire.from_record(record, spec))
