"""Differential privacy: clipping, the noise against its formula, epsilon against the accountant's own number."""

from __future__ import annotations

from typing import Any

import dp_accounting
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.serverapp.exception import PrivacyBudgetExhausted
from strategyfakes import answer, arrays_of, build, grid_of, play, record_of, wandering

from alora_kernels.federated import FedConfig, wire
from alora_kernels.federated.config import DpSettings
from alora_kernels.federated.state import FromRound
from alora_kernels.federated.strategies import STRATEGIES, clip, privacy_spent

START = record_of(w=[0.5, 0.5])


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


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_number_without_a_dimension_is_refused_because_flower_would_not_clip_it(side: Any) -> None:
    start = record_of(a=[0.0, 0.0], c=0.0)
    far = lambda node, round_, sent: {key: value + np.float32(9) for key, value in sent.items()}  # noqa: E731
    plain = flower.FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    theirs = flower.DifferentialPrivacyServerSideFixedClipping(plain, 0.0, 1.0, 2)
    assert arrays_of(play(theirs, start, [1], far, nodes=2))["c"] == 9  # when this fails, Flower has mended it
    with pytest.raises(ValueError, match=r"c has shape \[\], which Flower's clipping leaves as it is"):
        play(build(dp=DpSettings(1.0, 1.0, side=side), nodes=2), start, [1], far, nodes=2)


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
    assert privacy_spent(FromRound(strategy, 2)) == spent


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
    context = Context(0, 1, {}, RecordDict(), {})
    reply = clip(message, context, lambda m, c: answer(m, {"w": np.float32([30.5, 40.5])}))
    np.testing.assert_allclose(arrays_of(reply.content[wire.ARRAYS])["w"], [0.5 + 1.2, 0.5 + 1.6], rtol=1e-6)
