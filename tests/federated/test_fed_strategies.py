"""Strategies by name against NumPy; options refused with a reason; a run that goes on; differential privacy."""

from __future__ import annotations

import logging
from typing import Any

import dp_accounting
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message
from flwr.serverapp.exception import PrivacyBudgetExhausted
from wirefakes import LOSS, answer, arrays_of, build, constant, grid_of, play, record_of, wandering

from alora_kernels.federated import FedConfig, wire
from alora_kernels.federated.client import clipped
from alora_kernels.federated.config import DpSettings
from alora_kernels.federated.strategies import STRATEGIES, build_strategy, privacy_spent

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


def test_the_smallest_quorum_that_trims_really_trims() -> None:
    for beta in (0.07, 0.1, 0.2, 0.3, 1 / 3, 1 / 49, 0.49):
        smallest = next(n for n in range(2, 100) if int(beta * n) >= 1)
        build("fedtrimmedavg", nodes=smallest, population=100, beta=beta)
        with pytest.raises(ValueError, match=f"needs quorum >= {smallest} "):
            build("fedtrimmedavg", nodes=smallest - 1, population=100, beta=beta)


def test_two_and_two_rounds_of_fedadam_are_four_if_they_are_counted_on() -> None:
    through = play(build("fedadam"), START, [1, 2, 3, 4], wandering)
    strategy = build("fedadam")
    half = play(strategy, START, [1, 2], wandering)
    rest = play(strategy, half, [3, 4], wandering)
    naive = play(strategy, half, [1, 2], wandering)
    np.testing.assert_array_equal(arrays_of(rest)["w"], arrays_of(through)["w"])
    assert (arrays_of(naive)["w"] != arrays_of(through)["w"]).any()


def test_error_replies_are_left_out_of_the_mean() -> None:
    strategy = build(nodes=3)
    messages = list(strategy.configure_train(1, START, ConfigRecord(), grid_of(3)))
    replies = [answer(m, {"w": np.float32([i, i])}) for i, m in enumerate(messages[:2])]
    replies.append(Message(Error(0, "broke"), reply_to=messages[2]))
    arrays, _ = strategy.aggregate_train(1, replies)
    np.testing.assert_array_equal(arrays_of(arrays)["w"], [0.5, 0.5])


# ---- differential privacy: clipping, the noise against its formula, epsilon against the accountant's own number


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be >= 0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be >= 0"),
        ({"noise_multiplier": 0.0}, "must be > 0 for accounting"),
        ({"clipping_norm": 0.0}, "clipping_norm must be > 0"),
        ({"delta": 1.0}, "delta must be between 0 and 1"),
        ({"max_epsilon": 0.0}, "max_epsilon must be > 0"),
        ({"max_epsilon": 1.0, "accounting": False}, "max_epsilon needs accounting"),
        ({"side": "both"}, "side must be 'server' or 'client'"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DpSettings(**{"noise_multiplier": 1.0, "clipping_norm": 1.0, **wrong})


def test_updates_are_clipped_to_the_norm_over_all_arrays() -> None:
    dp = DpSettings(0.0, 2.0, accounting=False)
    start = record_of(a=[1.0, 1.0], b=[1.0])
    far = lambda node, round_, sent: {"a": np.float32([31, 41]), "b": np.float32([1])}  # noqa: E731, update (30, 40, 0)
    near = lambda node, round_, sent: {"a": np.float32([1.5, 1]), "b": np.float32([1])}  # noqa: E731
    clipped = arrays_of(play(build(dp=dp, nodes=2), start, [1], far, nodes=2))
    np.testing.assert_allclose(clipped["a"], [1 + 2 * 0.6, 1 + 2 * 0.8], rtol=1e-6)
    np.testing.assert_array_equal(clipped["b"], [1])
    np.testing.assert_array_equal(arrays_of(play(build(dp=dp, nodes=2), start, [1], near, nodes=2))["a"], [1.5, 1])


def test_flower_does_not_clip_a_number_without_a_dimension() -> None:
    start = record_of(a=[0.0, 0.0], c=0.0)
    far = lambda node, round_, sent: {key: value + np.float32(9) for key, value in sent.items()}  # noqa: E731
    plain = flower.FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    theirs = flower.DifferentialPrivacyServerSideFixedClipping(plain, 0.0, 1.0, 2)
    assert arrays_of(play(theirs, start, [1], far, nodes=2))["c"] == 9  # when this fails, Flower has mended it


@pytest.mark.parametrize("side", ["server", "client"])
def test_the_noise_has_the_standard_deviation_of_the_formula(side: Any) -> None:
    dp = DpSettings(0.8, 3.0, side=side)
    np.random.seed(0)
    size, nodes = 40_000, 4
    same = lambda node, round_, sent: {"w": sent["w"] + np.float32(1e-6)}  # noqa: E731
    end = arrays_of(play(build(dp=dp, nodes=nodes), record_of(w=np.zeros(size)), [1], same, nodes=nodes))["w"]
    wanted = 0.8 * 3.0 / nodes
    assert abs(end.std() / wanted - 1) < 5 / np.sqrt(2 * size)  # five standard errors
    assert abs(end.mean()) < 5 * wanted / np.sqrt(size)


def test_epsilon_is_the_accountants_own_number() -> None:
    dp = DpSettings(1.3, 1.0, delta=1e-6)
    strategy = build(dp=dp, nodes=3)
    assert privacy_spent(strategy)["epsilon"] == 0.0
    play(strategy, START, [1, 2, 3, 4], wandering, nodes=3)
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(1.3), 4)
    spent = privacy_spent(strategy)
    assert spent["epsilon"] == accountant.get_epsilon(1e-6) > 1
    assert (spent["delta"], spent["num_releases"], spent["accounting_method"]) == (1e-6, 4, "rdp")
    assert privacy_spent(strategy) == spent


def test_no_accountant_no_epsilon() -> None:
    assert privacy_spent(build()) is None
    assert privacy_spent(build(dp=DpSettings(1.0, 1.0, accounting=False))) is None


def test_a_spent_budget_stops_the_run_before_the_release_that_would_exceed_it() -> None:
    one = build(dp=DpSettings(1.0, 1.0), nodes=3)
    play(one, START, [1, 2], wandering, nodes=3)
    limit = privacy_spent(one)["epsilon"] + 1e-9
    strategy = build(dp=DpSettings(1.0, 1.0, max_epsilon=limit), nodes=3)
    with pytest.raises(PrivacyBudgetExhausted, match="max_epsilon"):
        play(strategy, START, [1, 2, 3], wandering, nodes=3)
    assert privacy_spent(strategy)["num_releases"] == 2


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fedavg"])
def test_accounting_is_for_the_plain_mean_only(name: str) -> None:
    with pytest.raises(ValueError, match=r"epsilon cannot be counted for .*plain mean.*accounting=False"):
        build(name, dp=DpSettings(1.0, 1.0))
    build(name, dp=DpSettings(1.0, 1.0, accounting=False))


@pytest.mark.parametrize(
    ("fraction", "quorum", "population", "wanted"), [(1.0, 2, 8, 8), (0.5, 2, 8, 4), (0.3, 3, 8, 3), (0.29, 1, 100, 28)]
)
def test_as_many_are_sampled_as_the_noise_is_measured_out_for(
    fraction: float, quorum: int, population: int, wanted: int
) -> None:
    for accounting in (True, False):
        dp = DpSettings(1.0, 1.0, accounting=accounting)
        strategy = build(dp=dp, nodes=quorum, population=population, fraction_train=fraction)
        assert strategy.num_sampled_clients == wanted
        messages = list(strategy.configure_train(1, START, ConfigRecord(), grid_of(population)))
        assert len(messages) == wanted


def test_with_accounting_a_round_with_a_missing_reply_is_void_and_costs_nothing() -> None:
    strategy = build(dp=DpSettings(1.0, 1.0), nodes=3)
    messages = list(strategy.configure_train(1, START, ConfigRecord(), grid_of(3)))
    replies = [answer(m, {"w": np.ones(2, np.float32)}) for m in messages[:2]]
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert privacy_spent(strategy)["num_releases"] == 0


def test_with_accounting_unequal_weights_are_an_error() -> None:
    with pytest.raises(ValueError, match="equal client weights"):
        play(build(dp=DpSettings(1.0, 1.0)), START, [1], wandering, examples=lambda node: node)


def test_the_client_clips_when_it_is_told_to() -> None:
    dp = DpSettings(1.0, 2.0, side="client")
    run = FedConfig(method="fed-alora", clients=["ann", "bob"], weights="equal")
    sides = [(None, False), (DpSettings(1.0, 2.0), False), (dp, True)]
    assert all(run.model_copy(update={"dp": settings}).clients_clip is clips for settings, clips in sides)
    message = next(iter(build(dp=dp, nodes=1).configure_train(1, START, ConfigRecord(), grid_of(1))))
    norm = message.content[wire.CONFIG]["clipping_norm"]
    reply = clipped(record_of(w=[30.5, 40.5]), message.content[wire.ARRAYS], norm)
    np.testing.assert_allclose(arrays_of(reply)["w"], [0.5 + 1.2, 0.5 + 1.6], rtol=1e-6)
    sent = ArrayRecord(dict(reversed(record_of(a=[1.0], b=[7.0]).items())))  # a server may send them in any order
    assert list(sent) == ["b", "a"]
    moved = arrays_of(clipped(record_of(a=[1.3], b=[7.4]), sent, 0.25))
    np.testing.assert_allclose([*moved["a"], *moved["b"]], [1.15, 7.2], rtol=1e-6)
