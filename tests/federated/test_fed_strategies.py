"""Strategies by name against NumPy; options refused with a reason; a run that goes on."""

from __future__ import annotations

import logging
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message
from strategyfakes import LOSS, answer, arrays_of, build, constant, grid_of, play, record_of, wandering

from alora_kernels.federated import wire
from alora_kernels.federated.state import FromRound
from alora_kernels.federated.strategies import STRATEGIES, build_strategy

VALUES = {
    node: np.array(v, np.float32)
    for node, v in {1: [0.0, 1.0], 2: [1.0, 3.0], 3: [2.0, 2.0], 4: [4.0, 8.0], 5: [100.0, -50.0]}.items()
}
ALL = np.stack(list(VALUES.values()))
START = record_of(w=[0.5, 0.5])


def after_one(strategy: Any, **how: Any) -> np.ndarray:
    return arrays_of(play(strategy, START, [1], constant(VALUES), **how))["w"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_keeps_keys_shapes_and_dtype(name: str) -> None:
    start = record_of(a=np.ones((2, 3)), b=np.zeros(4), c=0.5)
    end = play(build(name), start, [1, 2], wandering, metrics=lambda node: {"before-loss": node / 3})
    for key, value in arrays_of(start).items():
        got = arrays_of(end)[key]
        assert (got.dtype, got.shape) == (np.float32, value.shape)
        assert np.isfinite(got).all() and (got != value).any()


@pytest.mark.parametrize("theirs", [flower.FedAdam(fraction_evaluate=0.0, min_train_nodes=5), None])
def test_why_fedadam_is_wrapped(theirs: Any) -> None:
    assert after_one(theirs or build("fedadam")).dtype == (np.float64 if theirs else np.float32)


def test_fedavg_is_the_mean_weighted_by_examples() -> None:
    got = after_one(build(), examples=lambda node: node)
    np.testing.assert_allclose(got, np.average(ALL, axis=0, weights=[1, 2, 3, 4, 5]), rtol=1e-6)


def test_fedmedian_and_trimmed_mean() -> None:
    np.testing.assert_array_equal(after_one(build("fedmedian")), np.median(ALL, axis=0))
    trimmed = np.sort(ALL, axis=0)[1:4].mean(axis=0)
    np.testing.assert_allclose(after_one(build("fedtrimmedavg", beta=0.2)), trimmed, rtol=1e-6)


def test_krum_takes_a_client_in_the_crowd_and_multikrum_the_mean_of_two() -> None:
    distances = ((ALL[:, None] - ALL[None]) ** 2).sum(-1)
    scores = np.sort(distances, axis=1)[:, 1:3].sum(1)  # the 5 - 1 - 2 nearest
    order = np.argsort(scores)
    np.testing.assert_array_equal(after_one(build("krum", num_malicious_nodes=1)), ALL[order[0]])
    both = after_one(build("multikrum", num_malicious_nodes=1))
    np.testing.assert_allclose(both, ALL[order[:2]].mean(0), rtol=1e-6)


def test_bulyan_is_the_mean_near_the_median() -> None:
    values = {n: np.float32([n, n % 3]) for n in range(1, 7)} | {7: np.float32([1e6, -1e6])}
    got = arrays_of(play(build("bulyan", nodes=7, num_malicious_nodes=1), START, [1], constant(values), nodes=7))["w"]
    assert (np.abs(got) <= 6).all()  # the outlier is gone


def test_fedavgm_adds_momentum() -> None:
    strategy = build("fedavgm")  # momentum 0.9, rate 0.5
    start, mean = np.array([0.5, 0.5]), ALL.mean(0)
    first = start - 0.5 * (start - mean)
    second = first - 0.5 * (0.9 * (start - mean) + (first - mean))
    got = arrays_of(play(strategy, START, [1, 2], constant(VALUES)))["w"]
    np.testing.assert_allclose(got, second, rtol=1e-6)


@pytest.mark.parametrize("name", ["fedadam", "fedadagrad", "fedyogi"])
def test_adaptive_strategies_take_the_first_step_of_their_paper(name: str) -> None:
    strategy = build(name, **{"eta": 0.1, "tau": 1e-3})
    delta = ALL.mean(0) - 0.5
    if name == "fedadagrad":
        m, v, rate = delta, delta**2, 0.1
    else:
        m, v, rate = 0.1 * delta, 0.01 * delta**2, 0.1
    if name == "fedadam":  # Flower corrects with round + 1
        rate = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    np.testing.assert_allclose(after_one(strategy), 0.5 + rate * m / (np.sqrt(v) + 1e-3), rtol=1e-5)


def test_qfedavg_is_the_plain_mean_at_q_zero_and_leans_to_high_loss_above() -> None:
    losses = {1: 0.1, 2: 0.1, 3: 0.1, 4: 5.0, 5: 0.1}
    metrics = lambda node: {"before-loss": losses[node]}  # noqa: E731
    np.testing.assert_allclose(after_one(build("qfedavg", q=0.0), metrics=metrics), ALL.mean(0), rtol=1e-5)
    small = {n: v / 100 for n, v in VALUES.items()}
    ends = [
        arrays_of(play(build("qfedavg", q=q), record_of(w=[0, 0]), [1], constant(small), metrics=metrics))["w"]
        for q in (0.0, 1.0)
    ]
    toward = [float(end @ small[4] / np.linalg.norm(end) / np.linalg.norm(small[4])) for end in ends]
    assert toward[1] > toward[0]


def test_messages_carry_our_names_and_there_is_no_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flwr"):
        strategy = build(nodes=3)
    assert caplog.records == []
    assert logging.getLogger("flwr").filters == []
    messages = list(strategy.configure_train(4, START, ConfigRecord({"x": 1}), grid_of(3)))
    assert sorted(m.metadata.dst_node_id for m in messages) == [1, 2, 3]
    assert set(messages[0].content) == {wire.ARRAYS, wire.CONFIG}
    assert messages[0].content[wire.CONFIG][wire.ROUND] == 4
    assert list(strategy.configure_evaluate(4, START, ConfigRecord(), grid_of(3))) == []


def test_fraction_train_samples_that_many_but_never_less_than_the_quorum() -> None:
    strategy = build(nodes=2, population=10, fraction_train=0.5)
    assert len(list(strategy.configure_train(1, START, ConfigRecord(), grid_of(10)))) == 5
    assert len(list(strategy.configure_train(1, START, ConfigRecord(), grid_of(3)))) == 2


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("fedsgd", {}, ValueError, "unknown strategy 'fedsgd'; known are fedavg, fedavgm"),
        ("fedprox", {}, ValueError, "proximal term belongs into the clients' loss"),
        ("secagg+", {}, ValueError, "secure aggregation is not offered.*legacy workflow.*cannot check them"),
        ("fedadam", {"beta1": 0.9}, ValueError, "no option 'beta1'; it has fraction_train, train_metrics_aggr_fn, eta"),
        ("fedavg", {"fraction_evaluate": 1.0}, ValueError, "inside the train replies"),
        ("fedavg", {"evaluate_metrics_aggr_fn": print}, ValueError, "inside the train replies"),
        ("fedavg", {"min_evaluate_nodes": 1}, ValueError, "inside the train replies"),
        ("fedavg", {"min_train_nodes": 1}, ValueError, "follows from the quorum"),
        ("fedavg", {"min_available_nodes": 1}, ValueError, "follows from the quorum"),
        ("fedavg", {"weighted_by_key": "n"}, ValueError, "part of the wire format"),
        ("fedavg", {"arrayrecord_key": "n"}, ValueError, "part of the wire format"),
        ("fedavg", {"configrecord_key": "n"}, ValueError, "part of the wire format"),
        ("fedadam", {"eta": "0.1"}, TypeError, "option 'eta' of strategy fedadam must be float, got '0.1'"),
        ("fedadam", {"eta": True}, TypeError, "must be float, got True"),
        ("krum", {"num_malicious_nodes": 1.0}, TypeError, "must be int, got 1.0"),
        ("qfedavg", {**LOSS, "train_loss_key": 3}, TypeError, "must be str, got 3"),
        ("bulyan", {"selection_rule": "krum"}, TypeError, "must be a function, got 'krum'"),
        ("qfedavg", {"train_loss_key": "before-loss"}, ValueError, "needs the option 'client_learning_rate'"),
        ("qfedavg", {"client_learning_rate": 0.1}, ValueError, "needs train_loss_key"),
        ("fedavg", {"fraction_train": 0.0}, ValueError, r"fraction_train must be in \(0, 1\], got 0.0"),
        ("krum", {"num_malicious_nodes": 2}, ValueError, "needs quorum >= 7 .* got 5"),
        ("krum", {"num_malicious_nodes": -1}, ValueError, "num_malicious_nodes must be >= 0"),
        ("multikrum", {"num_nodes_to_select": 6}, ValueError, "between 1 and quorum=5, got 6"),
        ("bulyan", {"num_malicious_nodes": 1}, ValueError, "needs quorum >= 7"),
        ("fedtrimmedavg", {"beta": 0.1}, ValueError, "needs quorum >= 10"),
        ("fedtrimmedavg", {"beta": 0.0}, ValueError, r"beta must be in \(0, 0.5\), got 0.0; without trimming use"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    name: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        build_strategy(name, options, quorum=5, dp=None, population=8)


def test_whole_numbers_do_for_floats_and_none_for_functions() -> None:
    assert build("fedadam", nodes=2, eta=1, train_metrics_aggr_fn=None).eta == 1


@pytest.mark.parametrize(("quorum", "population"), [(0, 3), (4, 3)])
def test_quorum_within_the_population(quorum: int, population: int) -> None:
    with pytest.raises(ValueError, match="quorum must be between 1 and population=3"):
        build(nodes=quorum, population=population)


def test_the_smallest_quorum_that_trims_really_trims() -> None:
    for beta in (0.07, 0.1, 0.2, 0.3, 1 / 3, 1 / 49, 0.49):
        smallest = next(n for n in range(2, 100) if int(beta * n) >= 1)
        build("fedtrimmedavg", nodes=smallest, population=100, beta=beta)
        with pytest.raises(ValueError, match=f"needs quorum >= {smallest} "):
            build("fedtrimmedavg", nodes=smallest - 1, population=100, beta=beta)


def test_two_and_two_rounds_of_fedadam_are_four() -> None:
    through = play(FromRound(build("fedadam"), 0), START, [1, 2, 3, 4], wandering)
    strategy = build("fedadam")
    half = play(strategy, START, [1, 2], wandering)
    rest = play(FromRound(strategy, 2), half, [1, 2], wandering)
    naive = play(strategy, half, [1, 2], wandering)
    np.testing.assert_array_equal(arrays_of(rest)["w"], arrays_of(through)["w"])
    assert (arrays_of(naive)["w"] != arrays_of(through)["w"]).any()


def test_start_drives_it_and_clients_see_the_true_round() -> None:
    told: list[int] = []
    grid = grid_of(2)

    def send(messages: Any, timeout: float) -> list[Message]:
        told.extend(int(m.content[wire.CONFIG][wire.ROUND]) for m in messages)
        return [answer(m, {"w": np.ones(2, np.float32)}) for m in messages]

    grid.send_and_receive.side_effect = send
    result = FromRound(build(nodes=2), 5).start(grid, START, num_rounds=2)
    assert told == [6, 6, 7, 7]
    np.testing.assert_array_equal(arrays_of(result.arrays)["w"], [1, 1])
    with pytest.raises(ValueError, match="done must be >= 0"):
        FromRound(build(), -1)


def test_the_wrapper_hands_everything_on() -> None:
    seen: list[tuple[str, int]] = []

    class Spy(flower.FedAvg):
        def configure_evaluate(self, server_round: int, *_: Any) -> list[Message]:
            seen.append(("configure", server_round))
            return []

        def aggregate_evaluate(self, server_round: int, replies: Any) -> None:
            seen.append(("aggregate", server_round))

        def summary(self) -> None:
            seen.append(("summary", 0))

    wrapped = FromRound(Spy(), 3)
    wrapped.configure_evaluate(1, START, ConfigRecord(), grid_of(1))
    wrapped.aggregate_evaluate(1, [])
    wrapped.summary()
    assert seen == [("configure", 4), ("aggregate", 4), ("summary", 0)]


def test_error_replies_are_left_out_of_the_mean() -> None:
    strategy = build(nodes=3)
    messages = list(strategy.configure_train(1, START, ConfigRecord(), grid_of(3)))
    replies = [answer(m, {"w": np.float32([i, i])}) for i, m in enumerate(messages[:2])]
    replies.append(Message(Error(0, "broke"), reply_to=messages[2]))
    arrays, _ = strategy.aggregate_train(1, replies)
    np.testing.assert_array_equal(arrays_of(arrays)["w"], [0.5, 0.5])
