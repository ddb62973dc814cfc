"""Flower by hand: a spec, honest and crafted replies, a grid whose nodes answer as told, rounds of strategies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from alora_kernels.federated import wire
from alora_kernels.federated.config import DpSettings, Limits
from alora_kernels.federated.guard import GuardedGrid
from alora_kernels.federated.local import InProcessGrid
from alora_kernels.federated.strategies import build_strategy

SPEC = wire.WireSpec(
    method="fed-alora",
    arrays={"layer.B": ("float32", (8, 4)), "other.B": ("float32", (6, 2))},
    base="base",
    scaling=2.0,
    seed=0,
    metrics=("accuracy", "loss"),
)
LOSS = {"train_loss_key": "before-loss", "client_learning_rate": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "fedavgm": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "multikrum": {"num_nodes_to_select": 2},
    "qfedavg": LOSS,
}
Arrays = Mapping[str, np.ndarray]
Answer = Callable[[Message], Message | list[Message] | None]
Client = Callable[[int, int, Arrays], Arrays]  # (node, round, sent) -> reply


# ---- what travels


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
    return {**dict.fromkeys(spec.metric_keys(kind), 0.5), wire.EXAMPLES: examples}


def content(message: Message, *, arrays: Any = None, metrics: Any = None, **says: Any) -> RecordDict:
    """Records of a reply; what is not given is honest. `says` is what it says of itself: `client`, `nonce`, ..."""
    asked, node = message.content.config_records[wire.CONFIG], message.metadata.dst_node_id
    kind = message.metadata.message_type
    reply = {
        wire.CLIENT: f"client-{node}",
        wire.NONCE: asked.get(wire.NONCE, ""),
        wire.SPEC: asked.get(wire.SPEC, ""),
        wire.SECONDS: 1.5,
        **{name.replace("_", "-"): value for name, value in says.items()},
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


def record_of(**arrays: Any) -> ArrayRecord:
    return wire.to_record({key: np.asarray(value, dtype=np.float32) for key, value in arrays.items()})


def arrays_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {key: array.numpy() for key, array in record.items()}


def honest(message: Message, **changed: Any) -> Message:
    return Message(content(message, **changed), reply_to=message)


def failing(reason: str) -> Answer:
    return lambda message: Message(Error(code=2, reason=reason), reply_to=message)


class ScriptedGrid(InProcessGrid):
    """Nodes 1 to n; `answers[node]` makes the reply, several, or none. Arrival is in reverse order of the nodes."""

    def __init__(self, answers: Mapping[int, Answer]) -> None:
        super().__init__(ClientApp(), len(answers))
        self.answers = dict(answers)
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
    answers: Mapping[int, Answer], limits: Limits | None = None, *, spec: wire.WireSpec = SPEC, **options: Any
) -> tuple[GuardedGrid, list[dict[str, Any]]]:
    """A guard around a scripted grid, and the list its events go to."""
    events: list[dict[str, Any]] = []
    grid = GuardedGrid(ScriptedGrid(answers), spec, limits or Limits(), run="r", on_event=events.append, **options)
    return grid, events


# ---- strategies


def start(grid: Any, nodes: int, rounds: int = 1, cls: type[FedAvg] = FedAvg, **options: Any) -> Result:
    """Rounds of a strategy of Flower's that waits for so many nodes, as its own `start` plays them."""
    strategy = cls(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes, **options)
    return strategy.start(grid, initial_arrays=wire.to_record(initial()), num_rounds=rounds)


def build(
    name: str = "fedavg", dp: DpSettings | None = None, nodes: int = 5, population: int | None = None, **options: Any
) -> Any:
    """One of our strategies by name that waits for so many nodes."""
    options = {**OPTIONS.get(name, {}), **options}
    return build_strategy(name, options, quorum=nodes, dp=dp, population=population or nodes)


def grid_of(nodes: int) -> ScriptedGrid:
    """A grid with nodes 1..n that do not answer."""
    return ScriptedGrid(dict.fromkeys(range(1, nodes + 1), lambda message: None))


def answer(
    message: Message, arrays: Arrays, examples: float = 1, metrics: Mapping[str, float] | None = None
) -> Message:
    counted = MetricRecord({wire.EXAMPLES: examples, **(metrics or {})})
    return Message(RecordDict({wire.ARRAYS: wire.to_record(arrays), wire.METRICS: counted}), reply_to=message)


def play(
    strategy: Strategy,
    arrays: ArrayRecord,
    rounds: Sequence[int],
    client: Client,
    *,
    nodes: int = 5,
    examples: Callable[[int], float] = lambda node: 1,
    metrics: Callable[[int], Mapping[str, float]] = lambda node: {},
) -> ArrayRecord:
    """The rounds as Flower's `start` plays them, without anything around."""
    for number in rounds:
        replies = []
        for message in strategy.configure_train(number, arrays, ConfigRecord(), grid_of(nodes)):
            node, sent = message.metadata.dst_node_id, arrays_of(message.content[wire.ARRAYS])
            told = int(message.content[wire.CONFIG][wire.ROUND])
            replies.append(answer(message, client(node, told, sent), examples(node), metrics(node)))
        replies.sort(key=lambda reply: reply.metadata.src_node_id)
        aggregated, _ = strategy.aggregate_train(number, replies)
        arrays = arrays if aggregated is None else aggregated
    return arrays


def wandering(node: int, round_: int, sent: Arrays) -> dict[str, np.ndarray]:
    """A client whose update depends on the node, the round and what it was sent."""
    rng = np.random.default_rng([node, round_])
    return {
        key: (value * 0.9 + rng.normal(0, 0.3, value.shape)).astype(value.dtype) for key, value in sorted(sent.items())
    }


def constant(values: Mapping[int, np.ndarray], key: str = "w") -> Client:
    """Clients that always reply with the same array."""
    return lambda node, round_, sent: {key: values[node]}
