"""For tests of what travels: a spec, honest and crafted replies, a grid whose nodes answer as told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from alora_kernels.federated import wire
from alora_kernels.federated.config import Limits
from alora_kernels.federated.guard import GuardedGrid
from alora_kernels.federated.local import InProcessGrid

SPEC = wire.WireSpec(
    method="fed-alora",
    arrays={"layer.B": ("float32", (8, 4)), "other.B": ("float32", (6, 2))},
    base="base",
    scaling=2.0,
    seed=0,
    metrics=("accuracy", "loss"),
)
Answer = Callable[[Message], Message | list[Message] | None]


def initial(spec: wire.WireSpec = SPEC, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=shape).astype(dtype) for key, (dtype, shape) in spec.arrays.items()}


def update(message: Message, node: int, step: float = 0.01) -> dict[str, np.ndarray]:
    """What the honest client of that node returns: the arrays it got plus a small step of its own."""
    rng = np.random.default_rng(node)
    return {
        key: array.numpy() + step * rng.normal(size=array.shape).astype(array.dtype)
        for key, array in message.content.array_records[wire.ARRAYS].items()
    }


def numbers(spec: wire.WireSpec = SPEC, *, kind: str = "train", examples: float = 10) -> dict[str, float]:
    """Metrics of an honest reply."""
    names = spec.metric_keys - {wire.EXAMPLES} if kind == "train" else spec.metrics
    return {wire.EXAMPLES: examples, **dict.fromkeys(names, 0.5)}


def content(
    message: Message,
    *,
    arrays: Any = None,
    metrics: Any = None,
    client: str | None = None,
    nonce: str | None = None,
    spec_hash: str | None = None,
    seconds: Any = 1.5,
) -> RecordDict:
    """Records of a reply; what is not given is honest."""
    config, node = message.content.config_records[wire.CONFIG], message.metadata.dst_node_id
    kind = message.metadata.message_type
    reply = {
        wire.CLIENT: f"client-{node}" if client is None else client,
        wire.NONCE: config.get(wire.NONCE, "") if nonce is None else nonce,
        wire.SPEC: config.get(wire.SPEC, "") if spec_hash is None else spec_hash,
        wire.SECONDS: seconds,
    }
    records: dict[str, Any] = {
        wire.METRICS: MetricRecord(numbers(kind=kind) if metrics is None else metrics),
        wire.REPLY: ConfigRecord(reply),
    }
    if kind == "train":
        arrays = update(message, node) if arrays is None else arrays
        records[wire.ARRAYS] = arrays if isinstance(arrays, ArrayRecord) else record(arrays)
    return RecordDict(records)


def record(arrays: dict[str, np.ndarray | Array]) -> ArrayRecord:
    return ArrayRecord({key: value if isinstance(value, Array) else Array(value) for key, value in arrays.items()})


def honest(message: Message, **changed: Any) -> Message:
    return Message(content(message, **changed), reply_to=message)


def failing(reason: str) -> Answer:
    return lambda message: Message(Error(code=2, reason=reason), reply_to=message)


class ScriptedGrid(Grid):
    """Nodes 1 to n; `answers[node]` makes the reply, several, or none. Arrival is in reverse order of the nodes."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        InProcessGrid(ClientApp(), 1)  # makes this process a server process, so that messages can be made
        self.answers = answers
        self.nodes: list[int] = sorted(answers, reverse=True)
        self.sent: list[Message] = []
        self.timeouts: list[float | None] = []
        self._ids = itertools.count()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies: list[Message] = []
        self.timeouts.append(timeout)
        for message in sorted(messages, key=lambda m: -m.metadata.dst_node_id):
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            self.sent.append(message)
            reply = self.answers[message.metadata.dst_node_id](message)
            replies += reply if isinstance(reply, list) else [reply] if reply is not None else []
        return replies

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def set_run(self, run: Any) -> None:
        self.chosen = run

    @property
    def run(self) -> Any:
        return "the run"

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        return ("created", args)

    def push_messages(self, messages: Any) -> Any:
        return ("pushed", messages)

    def pull_messages(self, message_ids: Any) -> Any:
        return ("pulled", message_ids)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def messages(nodes: Iterable[int], number: int = 1, kind: str = "train", arrays: Any = None) -> list[Message]:
    """A round's messages as Flower's strategies make them: one RecordDict for all."""
    shared = RecordDict(
        {
            wire.ARRAYS: wire.to_record(initial() if arrays is None else arrays),
            wire.CONFIG: ConfigRecord({wire.ROUND: number, "lr": 0.1}),
        }
    )
    return [Message(shared, dst_node_id=node, message_type=kind) for node in nodes]


def guarded(
    answers: dict[int, Answer], limits: Limits | None = None, **options: Any
) -> tuple[GuardedGrid, list[dict[str, Any]]]:
    """A guard around a scripted grid, and the list its events go to."""
    events: list[dict[str, Any]] = []
    grid = GuardedGrid(ScriptedGrid(answers), SPEC, limits or Limits(), run="r", on_event=events.append, **options)
    return grid, events
