"""Strategies driven by hand: a grid that only knows node ids, clients that are functions, one message per node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import create_autospec

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity

from alora_kernels.federated import wire
from alora_kernels.federated.config import DpSettings
from alora_kernels.federated.strategies import build_strategy

LOSS = {"train_loss_key": "before-loss", "client_learning_rate": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "fedavgm": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "multikrum": {"num_nodes_to_select": 2},
    "qfedavg": LOSS,
}
Client = Callable[[int, int, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]  # (node, round, sent) -> reply


def build(
    name: str = "fedavg", dp: DpSettings | None = None, nodes: int = 5, population: int | None = None, **options: Any
) -> Any:
    """A strategy by name that waits for so many nodes."""
    options = {**OPTIONS.get(name, {}), **options}
    return build_strategy(name, options, quorum=nodes, dp=dp, population=population or nodes)


def grid_of(nodes: int) -> Any:
    """A grid with nodes 1..n that sends nothing."""
    for name in ("task_id", "run_id", "node_id"):
        setattr(TaskIdentity, name, 1)  # Flower's processes have one; Message() reads it
    grid = create_autospec(Grid, instance=True)
    grid.get_node_ids.side_effect = lambda: list(range(1, nodes + 1))
    return grid


def arrays_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {key: array.numpy() for key, array in record.items()}


def record_of(**arrays: Any) -> ArrayRecord:
    return ArrayRecord({key: Array(np.asarray(value, dtype=np.float32)) for key, value in sorted(arrays.items())})


def answer(
    message: Message, arrays: Mapping[str, np.ndarray], examples: float = 1, metrics: Mapping[str, float] | None = None
) -> Message:
    content = RecordDict(
        {
            wire.ARRAYS: ArrayRecord({key: Array(np.asarray(value)) for key, value in sorted(arrays.items())}),
            wire.METRICS: MetricRecord({wire.EXAMPLES: examples, **(metrics or {})}),
        }
    )
    return Message(content, reply_to=message)


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
    grid = grid_of(nodes)
    for number in rounds:
        replies = []
        for message in strategy.configure_train(number, arrays, ConfigRecord(), grid):
            node = message.metadata.dst_node_id
            told = int(message.content[wire.CONFIG][wire.ROUND])
            sent = arrays_of(message.content[wire.ARRAYS])
            replies.append(answer(message, client(node, told, sent), examples(node), metrics(node)))
        replies.sort(key=lambda reply: reply.metadata.src_node_id)
        aggregated, _ = strategy.aggregate_train(number, replies)
        arrays = arrays if aggregated is None else aggregated
    return arrays


def wandering(node: int, round_: int, sent: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A client whose update depends on the node, the round and what it was sent."""
    rng = np.random.default_rng([node, round_])
    return {
        key: (value * 0.9 + rng.normal(0, 0.3, value.shape)).astype(value.dtype) for key, value in sorted(sent.items())
    }


def constant(values: Mapping[int, np.ndarray], key: str = "w") -> Client:
    """Clients that always reply with the same array."""
    return lambda node, round_, sent: {key: values[node]}
