"""The in-process grid: real bytes both ways, contexts that stay, failures as in a deployment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run

from alora_kernels.federated import wire
from alora_kernels.federated.local import InProcessGrid
from tests.federated.wirefakes import initial, messages


def app_of(train: Callable[[Message, Context], Any]) -> ClientApp:
    app = ClientApp()
    app.train()(train)
    return app


def adding_app() -> ClientApp:
    """Adds the partition's number to every array and counts its rounds in its state."""

    def train(message: Message, context: Context) -> Message:
        seen = context.state.config_records.get("seen", ConfigRecord({"rounds": 0}))["rounds"] + 1
        context.state["seen"] = ConfigRecord({"rounds": seen})
        step = context.node_config["partition-id"]
        arrays = {key: array.numpy() + step for key, array in message.content["arrays"].items()}
        metrics = MetricRecord({wire.EXAMPLES: 1, "rounds": seen})
        return Message(RecordDict({"arrays": wire.to_record(arrays), "metrics": metrics}), reply_to=message)

    return app_of(train)


def test_fedavg_runs_on_it_and_contexts_stay_between_rounds():
    ends, start = [], initial()
    for _ in range(2):
        grid = InProcessGrid(adding_app(), 3)
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        result = strategy.start(grid, initial_arrays=wire.to_record(start), num_rounds=2)
        for key, array in result.arrays.items():  # partitions add 0, 1 and 2: one per round in the mean
            np.testing.assert_allclose(array.numpy(), start[key] + 2, rtol=1e-6)
        assert result.train_metrics_clientapp[2]["rounds"] == 2
        assert [context.state["seen"]["rounds"] for context in grid.contexts.values()] == [2, 2, 2]
        ends.append(result.arrays)
    assert ends[0] == ends[1]  # equal runs give equal bits


def test_the_numbers_of_a_node_reach_its_client():
    configs: list[dict] = []
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        configs.append({**context.node_config, "id": context.node_id})
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 2)
    grid.send_and_receive([Message(RecordDict(), node, "query") for node in (2, 1)])
    assert configs == [{"partition-id": i, "num-partitions": 2, "id": i + 1} for i in range(2)]


def test_no_object_crosses_the_wire():
    got: list[Message] = []

    def train(message: Message, context: Context) -> Message:
        got.append(message)
        message.content["config"]["server-round"] = -1
        message.content["arrays"].pop("layer.B")
        return Message(message.content, reply_to=message)

    sent = messages([1, 2])
    before = sent[0].content["arrays"].copy()
    replies = InProcessGrid(app_of(train), 2).send_and_receive(sent)
    assert sent[0].content["arrays"] == before and sent[0].content["config"]["server-round"] == 1
    assert "layer.B" in before and "layer.B" not in replies[0].content["arrays"]
    for message, reply in zip(got, replies, strict=True):
        assert message.content["arrays"]["other.B"] is not before["other.B"]
        assert reply.content is not message.content


def test_the_tap_sees_both_directions_and_cannot_change_them():
    seen: list[tuple[str, int, int]] = []

    def tap(message: Message) -> None:
        seen.append((message.metadata.reply_to_message_id, message.metadata.src_node_id, message.metadata.dst_node_id))
        message.content["arrays"].clear()

    sent = messages([2, 1])
    replies = InProcessGrid(adding_app(), 2, on_message=tap).send_and_receive(sent)
    ids = {message.metadata.dst_node_id: message.metadata.message_id for message in sent}
    assert seen == [("", 1, 2), ("", 1, 1), (ids[1], 1, 1), (ids[2], 2, 1)]
    assert all(set(reply.content["arrays"]) == {"layer.B", "other.B"} for reply in replies)


def test_a_tap_that_raises_is_no_client_error():
    def tap(message: Message) -> None:
        raise AssertionError("leak")

    with pytest.raises(AssertionError, match="leak"):
        InProcessGrid(adding_app(), 1, on_message=tap).send_and_receive(messages([1]))


def test_replies_come_by_node_id_with_fresh_ids_and_their_origin():
    grid, sent = InProcessGrid(adding_app(), 3), messages([3, 1, 2])
    replies = grid.send_and_receive(sent)
    ids = {message.metadata.dst_node_id: message.metadata.message_id for message in sent}
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [ids[1], ids[2], ids[3]]
    assert len({*ids.values(), *(reply.metadata.message_id for reply in replies)}) == 6


def test_push_then_pull_runs_a_client_once():
    grid = InProcessGrid(adding_app(), 2)
    ids = grid.push_messages(messages([1, 2]))
    assert not grid.contexts[1].state.config_records
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids[1:])] == [2]
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [1]
    assert grid.pull_messages(ids) == []


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (lambda message, context: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda message, context: "ok", "TypeError: the client app returned str, not a Message"),
        (
            lambda message, context: Message(RecordDict({"m": MetricRecord({"n": 2**80})}), reply_to=message),
            "ValueError",
        ),
    ],
    ids=["raises", "returns no message", "cannot be serialised"],
)
def test_a_client_that_fails_becomes_an_error_reply(train, reason):
    sent = messages([1])
    (reply,) = InProcessGrid(app_of(train), 1).send_and_receive(sent)
    assert reply.has_error() and not reply.has_content()
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.error.reason.startswith(reason)
    assert reply.metadata.reply_to_message_id == sent[0].metadata.message_id


def test_an_interrupt_passes():
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InProcessGrid(app_of(train), 1).send_and_receive(messages([1]))


def test_bad_input_names_the_argument():
    with pytest.raises(ValueError, match="num_nodes must be >= 1"):
        InProcessGrid(ClientApp(), 0)
    grid = InProcessGrid(adding_app(), 2)
    with pytest.raises(ValueError, match=r"message to node 3, but the nodes are \[1, 2\]"):
        grid.send_and_receive(messages([1, 3]))
    assert not grid.contexts[1].state.config_records


def test_the_run_can_be_set_and_goes_into_messages_and_a_node_can_go_away():
    grid = InProcessGrid(ClientApp(), 2)
    grid.set_run(Run.create_empty(run_id=42))
    message = grid.create_message(RecordDict({"a": ArrayRecord()}), "train", 1, "7", ttl=5.0)
    assert grid.run.run_id == message.metadata.run_id == 42
    assert (message.metadata.group_id, message.metadata.ttl, message.metadata.dst_node_id) == ("7", 5.0, 1)
    del grid.contexts[1]
    assert grid.get_node_ids() == [2]
