"""One round as the guard sees it: what went to each node, what came of it, and the events that say so.

In:   a strategy's messages, later the replies.
Out:  stamped messages to send; accepted replies to average; one event per message and one for the round.
Who:  `guard` makes a `Round` for every `send_and_receive`.

Strategies put one and the same RecordDict into all messages of a round, so each message is made anew before it gets a
nonce of its own. A node's reply counts if it answers this round's message and is the first to do so; a late or a
further reply is reported by itself and takes nothing from the node.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message

from . import wire
from .checks import Answer, Checks, Kind, RefusedError, bytes_that_came, client_name, finite, short

log = logging.getLogger("alora_kernels.federated")


@dataclass
class Sent:
    """One message and what came of it; a reply nobody waits for gets one of its own, without bytes down.

    Attributes:
        node: whom it went to, or who replied.
        message, nonce, arrays, bytes_down: as it went out.
        reply, client, seconds, bytes_up: as it came back, unchecked but for their types.
        answer, reason: the checked content, or why there is none.
    """

    node: int
    message: Message | None = None
    nonce: str = ""
    arrays: wire.NDArrays = field(default_factory=dict)
    bytes_down: int = 0
    reply: Message | None = None
    client: str | None = None
    seconds: float | None = None
    bytes_up: int = 0
    answer: Answer | None = None
    reason: str | None = None

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
            self.seconds = float(cast(float, seconds)) if finite(seconds) else None


@dataclass
class Round:
    """The messages of one round by node, and replies that belong to none of them."""

    kind: Kind
    number: int
    sent: dict[int, Sent]
    extra: list[Sent] = field(default_factory=list)

    @property
    def outgoing(self) -> list[Message]:
        """The messages to send."""
        return [cast(Message, sent.message) for sent in self.sent.values()]

    @property
    def accepted(self) -> list[Sent]:
        """What passed, by client name: float sums then do not depend on who was first."""
        return sorted((sent for sent in self.sent.values() if sent.answer), key=lambda sent: sent.client or "")

    def receive(self, replies: Iterable[Message], checks: Checks, names: dict[int, str], limit: float) -> None:
        """Check the replies of a round, by node id.

        Args:
            replies: whatever came.
            checks: what they are held to.
            names: node -> client name of earlier rounds; learns from this one.
            limit: seconds they had, for the reason of those who did not reply.
        """
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            entry, reason = self._place(reply)
            entry.came(reply)
            try:
                if reason is not None:
                    raise RefusedError(reason)
                entry.answer = self._answer(entry, checks)
                names[entry.node] = cast(str, entry.client)
            except Exception as error:  # whatever a reply does to the checks, it is that reply that is wrong
                known = isinstance(error, RefusedError | wire.WireError)
                entry.reason = short(str(error) if known else f"{type(error).__name__}: {error}")
        for entry in [*self.sent.values(), *self.extra]:
            entry.client = entry.client or names.get(entry.node)
            if entry.answer is None:
                entry.reason = entry.reason or f"no reply within {limit:g} s"
                log.warning(
                    "refused client %s, node %d, round %d: %s", entry.client, entry.node, self.number, entry.reason
                )

    def _place(self, reply: Message) -> tuple[Sent, str | None]:
        """The message a reply answers, or an entry of its own; and why it cannot count, before its content is read."""
        node, answers = reply.metadata.src_node_id, reply.metadata.reply_to_message_id
        if reply.has_error():  # Flower itself answers for nodes it lost, from an id that is not theirs
            by_id = {sent.message_id: sent for sent in self.sent.values()}
            sent = self.sent.get(node) or by_id.get(answers)
        else:
            sent = self.sent.get(node)
        if sent is not None and sent.reply is None and answers == sent.message_id:
            return sent, _error_line(reply) if reply.has_error() else None
        self.extra.append(Sent(node))
        if reply.has_error():
            return self.extra[-1], _error_line(reply)
        if sent is None:
            return self.extra[-1], f"node {node} was not asked in this round"
        if sent.reply is not None:
            return self.extra[-1], "second reply of this node in this round; the first one counts"
        return self.extra[-1], "late: it does not answer the message of this round"

    def _answer(self, entry: Sent, checks: Checks) -> Answer:
        answer = checks.answer(self.kind, cast(Message, entry.reply).content, entry.nonce, entry.arrays)
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
            if self.kind == "train":
                content[wire.ARRAYS] = wire.to_record(answer.arrays)
            messages.append(make_message(metadata=reply.metadata, content=content))
        return messages

    def events(self, *, void: bool, seconds: float) -> list[dict[str, Any]]:
        """One event per message sent, one per reply that belongs to none, one for the round.

        Args:
            void: whether the round has no effect.
            seconds: how long it took.

        Returns:
            Dictionaries ready for JSON. `rejected` counts client events that are not accepted, so a second reply of an
            accepted node counts as well; bytes include what was refused.
        """
        entries = [*self.sent.values(), *self.extra]
        accepted = len(self.accepted)
        return [
            *(self._client_event(entry) for entry in entries),
            {
                "event": "round",
                "kind": self.kind,
                "round": self.number,
                "sampled": len(self.sent),
                "accepted": accepted,
                "rejected": len(entries) - accepted,
                "void": void,
                "bytes_down": sum(entry.bytes_down for entry in entries),
                "bytes_up": sum(entry.bytes_up for entry in entries),
                "seconds": seconds,
            },
        ]

    def _client_event(self, entry: Sent) -> dict[str, Any]:
        metrics = dict(entry.answer.metrics) if entry.answer else {}
        examples = metrics.pop(wire.EXAMPLES, None)
        if self.kind == "train":
            split = {
                name: {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
                for name, prefix in (("before", wire.BEFORE), ("after", wire.AFTER))
            }
        else:
            split = {"metrics": metrics}
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
            **split,
        }


def _error_line(reply: Message) -> str:
    lines = (reply.error.reason or "").strip().splitlines()
    return lines[-1].strip() if lines else f"error {reply.error.code} without a reason"


def stamp(messages: Iterable[Message], spec: wire.WireSpec, run: str) -> Round | None:
    """A round's messages made anew, each with the run's name, the spec's digest and its own nonce.

    Args:
        messages: a strategy's, all "train" or all "evaluate", with records `arrays` and `config`.
        spec: what the arrays must be; other float types are cast, as Flower's FedOpt family answers float32 in float64.
        run: name of the run.

    Returns:
        The round, or None without messages.

    Raises:
        ValueError: messages that are not one round's; the message names the remedy.
    """
    messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    kinds = {message.metadata.message_type for message in messages}
    if len(kinds) > 1 or not kinds <= {"train", "evaluate"}:
        raise ValueError(f"the guard sends rounds of 'train' or of 'evaluate' messages, got {', '.join(sorted(kinds))}")
    if not messages:
        return None
    numbers = {_round_number(message) for message in messages}
    if len(numbers) > 1:
        raise ValueError(f"messages of rounds {sorted(numbers)} in one call; send one round at a time")
    current = Round(cast(Kind, kinds.pop()), numbers.pop(), {})
    agreed: dict[int, tuple[ArrayRecord, wire.NDArrays]] = {}
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
        current.sent[node] = Sent(node, fresh, nonce, arrays, wire.payload_bytes(content))
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


def _as_agreed(record: ArrayRecord, spec: wire.WireSpec) -> tuple[ArrayRecord, wire.NDArrays]:
    wire.check_keys(set(record), set(spec.arrays))
    if any(record[key].dtype != dtype for key, (dtype, _) in spec.arrays.items()):
        wanted = {key: dtype for key, (dtype, _) in spec.arrays.items()}
        record = wire.to_record({k: a.numpy().astype(wanted[k], casting="same_kind") for k, a in record.items()})
    return record, wire.from_record(record, spec)
