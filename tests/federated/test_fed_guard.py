"""The guard: what goes out, who may answer, the events that tell of it; when a round is void, when a run ends."""

from __future__ import annotations

import dataclasses
import json
import logging
from unittest.mock import create_autospec

import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedMedian, strategy_utils
from wirefakes import SPEC, Clock, failing, guarded, honest, initial, messages, start, update

from alora_kernels.federated import wire
from alora_kernels.federated.config import Limits
from alora_kernels.federated.guard import GuardedGrid, QuorumError
from alora_kernels.federated.local import InProcessGrid
from alora_kernels.federated.strategies import FedAdam

HONEST = {1: honest, 2: honest, 3: honest}
KEY = "layer.B"


def silent(message: Message) -> None:
    return None


def from_node(node: int, made=honest):
    def answer(message: Message) -> Message:
        reply = made(message)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    return answer


def test_each_message_is_its_own_with_run_spec_and_nonce():
    grid, _ = guarded(HONEST)
    original = messages([3, 1, 2], number=7)
    grid.send_and_receive(original)
    sent = grid._grid.sent
    assert [(m.metadata.dst_node_id, m.metadata.group_id) for m in sent] == [(3, "7"), (2, "7"), (1, "7")]
    configs = [message.content["config"] for message in sent]
    for config in configs:
        assert set(config) == {wire.ROUND, "lr", wire.RUN, wire.SPEC, wire.NONCE}
        assert (config[wire.RUN], config[wire.SPEC], config[wire.ROUND], config["lr"]) == ("r", SPEC.digest, 7, 0.1)
    assert len({config[wire.NONCE] for config in configs}) == 3
    assert all(message.content["arrays"] is original[0].content["arrays"] for message in sent)
    assert set(original[0].content["config"]) == {wire.ROUND, "lr"}  # the strategy's own record is as it was
    assert {m.metadata.ttl for m in sent} == {original[0].metadata.ttl}


@pytest.mark.parametrize(("timeout", "expected"), [(None, 600.0), (5.0, 5.0), (3600.0, 600.0)])
def test_the_shorter_of_timeout_and_deadline_holds(timeout, expected):
    grid, _ = guarded(HONEST)
    grid.send_and_receive(messages([1, 2]), timeout=timeout)
    assert grid._grid.timeouts == [expected]


def test_replies_are_dense_and_sorted_by_client_name():
    names = {1: "zoe", 2: "ann", 3: "kim"}
    answers = {node: lambda m, name=name: honest(m, client=name) for node, name in names.items()}
    grid, _ = guarded(answers)
    sent = messages([1, 2, 3])
    replies = grid.send_and_receive(sent)
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 1]
    for reply in replies:
        assert set(reply.content) == {"arrays", "metrics"}
        assert list(reply.content["arrays"]) == sorted(SPEC.arrays)
        expected = update(sent[0], reply.metadata.src_node_id)
        for key, array in reply.content["arrays"].items():
            np.testing.assert_array_equal(array.numpy(), expected[key], strict=True)


def test_factors_are_accepted_and_equal_to_dense():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(8, 2)).astype("float32") / 4, rng.normal(size=(2, 4)).astype("float32") / 4
    other = {"other.B": initial()["other.B"]}
    dense = {KEY: initial()[KEY] + left @ right, **other}
    factors = {KEY + wire.LEFT: left, KEY + wire.RIGHT: right, **other}
    grid, events = guarded({1: lambda m: honest(m, arrays=dense), 2: lambda m: honest(m, arrays=factors)})
    first, second = grid.send_and_receive(messages([1, 2]))
    assert first.content["arrays"] == second.content["arrays"]
    assert [event["bytes_up"] for event in events[:2]] == [176, 176 - 128 + 4 * 2 * (8 + 4)]


def test_events_of_a_train_round():
    clock = Clock()

    def slow(message: Message) -> Message:
        clock.now += 4
        return honest(message, seconds=float("nan"))

    grid, events = guarded({1: honest, 2: slow, 3: silent}, clock=clock)
    grid.send_and_receive(messages([3, 2, 1], number=5), timeout=30)
    halves = {"before": {"accuracy": 0.5, "loss": 0.5}, "after": {"accuracy": 0.5, "loss": 0.5}}
    same = {"event": "client", "kind": "train", "round": 5, "bytes_down": 176}
    good = {**same, "accepted": True, "reason": None, "bytes_up": 176, "examples": 10, **halves}
    assert events == [
        {**good, "node": 1, "client": "client-1", "seconds": 1.5},
        {**good, "node": 2, "client": "client-2", "seconds": None},
        {**same, "node": 3, "client": None, "accepted": False, "reason": "no reply within 30 s", "bytes_up": 0,
         "examples": None, "seconds": None, "before": {}, "after": {}},
        {"event": "round", "kind": "train", "round": 5, "sampled": 3, "accepted": 2, "rejected": 1, "void": False,
         "bytes_down": 3 * 176, "bytes_up": 2 * 176, "seconds": 4.0},
    ]  # fmt: skip
    json.dumps(events, allow_nan=False)


def test_events_of_an_evaluate_round_and_too_few_is_not_void():
    grid, events = guarded({1: honest, 2: failing("ValueError: no test data")}, Limits(quorum=2, patience=1))
    (reply,) = grid.send_and_receive(messages([1, 2], kind="evaluate"))
    assert set(reply.content) == {"metrics"} and reply.metadata.src_node_id == 1
    assert events[0]["metrics"] == {"accuracy": 0.5, "loss": 0.5} and "before" not in events[0]
    assert (events[0]["bytes_down"], events[0]["bytes_up"], events[1]["metrics"]) == (176, 0, {})
    assert events[1]["reason"] == "ValueError: no test data"
    assert (events[2]["kind"], events[2]["accepted"], events[2]["void"]) == ("evaluate", 1, False)


def test_arrays_in_an_evaluation_are_refused():
    def leaking(message: Message) -> Message:
        reply = honest(message)
        reply.content["arrays"] = wire.to_record(initial())
        return reply

    grid, events = guarded({1: honest, 2: leaking})
    assert len(grid.send_and_receive(messages([1, 2], kind="evaluate"))) == 1
    assert events[1]["reason"].startswith(
        "has an unexpected record 'arrays'; the reply of this evaluate round has exactly"
    )


@pytest.mark.parametrize("shape", [(10**6, 10**6), (-(10**6), 1), (10**40,)])
def test_bytes_up_are_those_that_came_whatever_the_shape_says(shape):
    lying = Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=bytes(500))
    grid, events = guarded({1: lambda message: honest(message, arrays={KEY: lying}), 2: honest})
    grid.send_and_receive(messages([1, 2]))
    assert [event["bytes_up"] for event in events] == [500, 176, 676]


def test_a_second_reply_is_refused_and_the_first_one_counts():
    def twice(message: Message) -> list[Message]:
        return [honest(message), honest(message, arrays={k: v + 1 for k, v in update(message, 2).items()})]

    grid, events = guarded({1: honest, 2: twice, 3: honest})
    replies = grid.send_and_receive(messages([1, 2, 3]))
    assert len(replies) == 3
    np.testing.assert_array_equal(
        replies[1].content["arrays"][KEY].numpy(), update(messages([2])[0], 2)[KEY], strict=True
    )
    extra, total = events[3:]
    assert (extra["node"], extra["client"], extra["accepted"], extra["bytes_down"]) == (2, "client-2", False, 0)
    assert extra["reason"] == "second reply of this node in this round; the first one counts"
    assert (total["sampled"], total["accepted"], total["rejected"]) == (3, 3, 1)
    assert (total["bytes_down"], total["bytes_up"]) == (3 * 176, 4 * 176)


def test_a_good_reply_after_a_bad_one_is_still_the_second():
    grid, events = guarded({1: honest, 3: honest, 2: lambda m: [honest(m, nonce="x"), honest(m)]})
    assert len(grid.send_and_receive(messages([1, 2, 3]))) == 2
    assert "nonce" in events[1]["reason"] and "second reply" in events[3]["reason"]


def test_a_late_reply_takes_nothing_from_its_node():
    kept: list[Message] = []

    def late(message: Message) -> list[Message]:
        kept.append(message)
        return [] if len(kept) == 1 else [honest(kept[0]), honest(message)]

    grid, events = guarded({1: honest, 2: honest, 3: late})
    assert len(grid.send_and_receive(messages([1, 2, 3], number=1))) == 2
    events.clear()
    assert len(grid.send_and_receive(messages([1, 2, 3], number=2))) == 3
    assert [event["accepted"] for event in events[:4]] == [True, True, True, False]
    assert (events[3]["reason"], events[3]["round"]) == ("late: it does not answer the message of this round", 2)


def test_an_old_reply_under_the_new_message_s_id_has_the_wrong_nonce():
    old: list[RecordDict] = []

    def replayed(message: Message) -> Message:
        old.append(honest(message).content)
        return Message(old[0], reply_to=message)

    grid, events = guarded({1: honest, 2: honest, 3: replayed})
    assert len(grid.send_and_receive(messages([1, 2, 3], number=1))) == 3
    assert len(grid.send_and_receive(messages([1, 2, 3], number=2))) == 2
    assert "an old or a forged reply" in events[-2]["reason"] and events[-2]["client"] == "client-3"


def test_a_node_that_was_not_asked():
    grid, events = guarded({1: honest, 2: honest, 3: from_node(99)})
    assert len(grid.send_and_receive(messages([1, 2, 3]))) == 2
    assert [event["reason"] for event in events[2:4]] == [
        "no reply within 600 s",
        "node 99 was not asked in this round",
    ]


def test_one_node_cannot_answer_for_another():
    grid, events = guarded({1: honest, 2: honest, 3: from_node(1)})
    assert [reply.metadata.src_node_id for reply in grid.send_and_receive(messages([1, 2, 3]))] == [1, 2]
    assert not any(event["accepted"] for event in events[:-1] if event["node"] == 3)


def test_an_error_flower_makes_for_a_lost_node_is_that_node_s():
    grid, events = guarded({1: honest, 2: honest, 3: from_node(777, failing("node unavailable"))})
    assert len(grid.send_and_receive(messages([1, 2, 3]))) == 2
    assert len(events) == 4 and (events[2]["node"], events[2]["reason"]) == (3, "node unavailable")


def test_a_client_keeps_its_name_in_events_when_it_fails(caplog):
    grid, events = guarded(dict(HONEST))
    grid.send_and_receive(messages([1, 2, 3], number=1))
    grid._grid.answers[3] = failing("OSError: disk\nWARNING forged line \x1b[31m")
    grid.send_and_receive(messages([1, 2, 3], number=2))
    assert events[-2]["client"] == "client-3"
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "alora" in r.name]
    assert line == "refused client client-3, node 3, round 2: WARNING forged line  [31m"


def test_a_method_that_sends_no_arrays_still_has_rounds():
    grid, events = guarded(HONEST, spec=dataclasses.replace(SPEC, method="local", arrays={}))
    result = FedAvg().start(grid, initial_arrays=wire.to_record({}), num_rounds=1)
    assert [event["accepted"] for event in events if event["event"] == "round"] == [3, 3]
    assert events[3]["bytes_up"] == events[3]["bytes_down"] == 0 and len(result.arrays) == 0


def test_no_messages_no_round():
    grid, events = guarded(HONEST)
    assert grid.send_and_receive([]) == [] and not events and not grid._grid.timeouts


def test_everything_else_is_forwarded():
    inner = create_autospec(Grid, instance=True)
    inner.get_node_ids.return_value = [3, 1, 2]
    grid = GuardedGrid(inner, SPEC, Limits(), run="r", on_event=print)
    assert grid.get_node_ids() == [1, 2, 3] and grid.run is inner.run
    for name in ("set_run", "push_messages", "pull_messages"):
        assert getattr(grid, name)("it") is getattr(inner, name).return_value
        getattr(inner, name).assert_called_once_with("it")
    assert grid.create_message("c", "train", 1, "g") is inner.create_message.return_value
    assert grid.get_nodes() is inner.get_nodes.return_value


@pytest.mark.parametrize(
    ("sent", "match"),
    [
        (lambda: messages([1], arrays={KEY: initial()[KEY]}), r"missing \['other.B'\]"),
        (lambda: messages([1], arrays={**initial(), KEY: np.zeros((8, 1), "float32")}), r"has shape \(8, 1\)"),
        (lambda: messages([1], arrays={**initial(), KEY: np.zeros((8, 4))}), "has dtype float64, agreed is float32"),
    ],
)
def test_the_server_s_own_mistakes_are_errors(sent, match):
    grid, events = guarded(HONEST)
    with pytest.raises(ValueError, match=match):
        grid.send_and_receive(sent())
    assert not events


def test_a_number_without_a_dimension_keeps_its_shape():
    spec = dataclasses.replace(SPEC, arrays={"scale": ("float32", ())})
    assert wire.from_record(wire.to_record({"scale": np.float32(3)}), spec) == {"scale": 3}


def test_fewer_than_the_quorum_is_a_void_round_and_arrays_stay():
    bad = failing("ValueError: no")
    grid, events = guarded({1: honest, 2: bad, 3: bad})
    result = start(grid, 3, rounds=2)
    rounds = [event for event in events if event["event"] == "round"]
    assert [(r["void"], r["accepted"]) for r in rounds] == [(True, 1), (True, 1)]
    assert all(message.content["arrays"] == wire.to_record(initial()) for message in grid._grid.sent)
    assert not result.train_metrics_clientapp


def test_patience_ends_the_run_and_names_the_reasons():
    grid, events = guarded({1: honest, 2: failing("ValueError: no"), 3: silent})
    for number in (1, 2):
        assert grid.send_and_receive(messages([1, 2, 3], number)) == []
    with pytest.raises(QuorumError) as caught:
        grid.send_and_receive(messages([1, 2, 3], 3))
    text = str(caught.value)
    assert "3 rounds in a row without a quorum, the last one (round 3)" in text
    assert "1 of 3 replies accepted, 2 needed within 600 s" in text and "lower the quorum" in text
    assert "node 2: ValueError: no; node 3: no reply within 600 s" in text
    assert sum(event["event"] == "round" for event in events) == 3  # the last one is reported before the end


def test_a_good_round_restores_patience_and_evaluation_does_not():
    grid, _ = guarded({1: honest, 2: silent}, Limits(patience=2))
    assert grid.send_and_receive(messages([1, 2], 1)) == []
    grid._grid.answers[2] = honest
    assert len(grid.send_and_receive(messages([1, 2], 2))) == 2
    grid._grid.answers[2] = silent
    assert grid.send_and_receive(messages([1, 2], 3)) == []
    assert len(grid.send_and_receive(messages([1, 2], 3, "evaluate"))) == 1
    with pytest.raises(QuorumError):
        grid.send_and_receive(messages([1, 2], 4))


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({node: failing(f"reason {node}") for node in range(1, 9)}, r"node 5: reason 5; and 3 more$"),
        (dict.fromkeys((1, 2), honest), "Every reply was accepted: sample more nodes"),
    ],
)
def test_many_reasons_are_cut_short_and_too_few_sampled_says_so(answers, says):
    grid, _ = guarded(answers, Limits(quorum=3, patience=1))
    with pytest.raises(QuorumError, match=says):
        grid.send_and_receive(messages(answers))


def test_flower_s_endless_wait_for_nodes_ends(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(strategy_utils, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    grid, _ = guarded(HONEST, Limits(deadline=20), clock=clock)
    with pytest.raises(QuorumError, match=r"3 nodes are connected and no further one came in 21 s .* 2 replies"):
        start(grid, 5)
    assert clock.now == 121 and not grid._grid.sent


def test_the_wait_begins_anew_with_each_node_and_each_round():
    clock = Clock()
    grid, _ = guarded(HONEST, Limits(deadline=20), clock=clock)
    grid._grid.nodes = []
    for seconds, nodes in ((0, []), (20, []), (20, [2]), (20, [2]), (20, [2, 1]), (20, [1])):
        clock.now += seconds if nodes != [2, 1] else 0
        grid._grid.nodes = nodes
        assert grid.get_node_ids() == sorted(nodes)
    clock.now += 1
    with pytest.raises(QuorumError, match="1 nodes are connected"):
        grid.get_node_ids()
    grid.send_and_receive(messages([1, 2]))
    clock.now += 1000  # a long evaluation on the server is no waiting
    assert grid.get_node_ids() == [1]
    clock.now += 20
    assert grid.get_node_ids() == [1]


@pytest.mark.parametrize(
    "bad",
    [
        {"quorum": 0}, {"quorum": 1.5}, {"quorum": True}, {"patience": 0}, {"max_examples": 0}, {"deadline": 0},
        {"deadline": float("inf")}, {"deadline": float("nan")}, {"norm_cap": 0.0}, {"norm_cap": float("nan")},
        {"norm_cap": -1.0}, {"deadline": "10"},
    ],
    ids=str,
)  # fmt: skip
def test_limits_that_nothing_could_pass(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        Limits(**bad)


def test_norm_cap_and_largest_weight_can_be_set():
    for changes, says in (({"max_examples": 9}, "num-examples is 10, outside (0, 9]"), ({}, "the cap is 0.001")):
        grid, events = guarded(HONEST, Limits(quorum=1, norm_cap=1e-3, **changes))
        assert grid.send_and_receive(messages([1, 2])) == []
        assert events[0]["reason"].endswith(says)


def test_fedadam_s_arrays_go_out_as_agreed():
    grid, events = guarded(HONEST)
    result = start(grid, 3, rounds=2, cls=FedAdam, eta=0.01)
    assert {array.dtype for array in result.arrays.values()} == {"float32"}
    assert {a.dtype for message in grid._grid.sent for a in message.content["arrays"].values()} == {"float32"}
    assert all(event["accepted"] for event in events if event["event"] == "client") and len(events) == 8


@pytest.mark.parametrize("make", [FedAvg, FedMedian])
def test_over_the_in_process_grid_train_and_evaluate(make):
    app = ClientApp()
    app.train()(lambda message, context: honest(message))
    app.evaluate()(lambda message, context: honest(message))
    events: list[dict] = []
    grid = GuardedGrid(InProcessGrid(app, 4), SPEC, Limits(quorum=4), run="r", on_event=events.append)
    result = make(min_available_nodes=4).start(grid, initial_arrays=wire.to_record(initial()), num_rounds=3)
    assert [event["accepted"] for event in events if event["event"] == "round"] == [4] * 6
    assert dict(result.evaluate_metrics_clientapp[3]) == {"accuracy": 0.5, "loss": 0.5}
    assert isinstance(result.arrays[KEY], Array) and result.arrays[KEY].dtype == "float32"


def test_the_mean_does_not_depend_on_the_order_of_arrival():
    means = []
    for order in (1, -1):
        grid, _ = guarded(dict.fromkeys(range(1, 8), honest))
        inner = grid._grid.send_and_receive
        grid._grid.send_and_receive = lambda m, inner=inner, order=order, timeout=None: inner(m)[::order]
        means.append(start(grid, 7).arrays)
    assert means[0] == means[1]
