"""Over the guard: when a round is void, when a run ends, and Flower's strategies as they are."""

from __future__ import annotations

import pytest
from flwr.app import Array
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedMedian,
    strategy_utils,
)

from alora_kernels.federated import wire
from alora_kernels.federated.config import Limits
from alora_kernels.federated.guard import GuardedGrid, QuorumError
from alora_kernels.federated.local import InProcessGrid
from tests.federated.wirefakes import SPEC, Clock, failing, guarded, honest, initial, messages

HONEST = {1: honest, 2: honest, 3: honest}
KEY = "layer.B"


def silent(message):
    return None


def test_fewer_than_the_quorum_is_a_void_round_and_arrays_stay():
    bad = failing("ValueError: no")
    grid, events = guarded({1: honest, 2: bad, 3: bad})
    start = wire.to_record(initial())
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    result = strategy.start(grid, initial_arrays=start, num_rounds=2)
    rounds = [event for event in events if event["event"] == "round"]
    assert [(r["void"], r["accepted"]) for r in rounds] == [(True, 1), (True, 1)]
    assert all(message.content["arrays"] == start for message in grid._grid.sent)
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


def test_many_reasons_are_cut_short():
    bad = {node: failing(f"reason {node}") for node in range(1, 9)}
    grid, _ = guarded(bad, Limits(patience=1))
    with pytest.raises(QuorumError, match=r"node 5: reason 5; and 3 more$"):
        grid.send_and_receive(messages(bad))


def test_too_few_sampled_says_so():
    grid, _ = guarded(HONEST, Limits(quorum=3, patience=1))
    with pytest.raises(QuorumError, match="Every reply was accepted: sample more nodes"):
        grid.send_and_receive(messages([1, 2]))


def test_flower_s_endless_wait_for_nodes_ends(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(strategy_utils, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    grid, _ = guarded(HONEST, Limits(deadline=20), clock=clock)
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=5)
    with pytest.raises(QuorumError, match=r"3 nodes are connected and no further one came in 21 s .* 2 replies"):
        strategy.start(grid, initial_arrays=wire.to_record(initial()), num_rounds=1)
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
    grid, events = guarded(HONEST, Limits(quorum=1, norm_cap=1e-3, max_examples=9))
    assert grid.send_and_receive(messages([1, 2])) == []
    assert "num-examples is 10, outside (0, 9]" in events[0]["reason"]
    grid, events = guarded(HONEST, Limits(quorum=1, norm_cap=1e-3))
    assert grid.send_and_receive(messages([1, 2])) == []
    assert events[0]["reason"].endswith("the cap is 0.001")


def test_fedadam_s_float64_goes_out_as_agreed():
    grid, events = guarded(HONEST)
    strategy = FedAdam(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3, eta=0.01)
    result = strategy.start(grid, initial_arrays=wire.to_record(initial()), num_rounds=2)
    assert {array.dtype for array in result.arrays.values()} == {"float64"}
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
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=7, min_available_nodes=7)
        means.append(strategy.start(grid, initial_arrays=wire.to_record(initial()), num_rounds=1).arrays)
    assert means[0] == means[1]
