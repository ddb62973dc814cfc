"""Clients that fail or differ: a clear reason in the ledger, the mean of the others, and an end instead of a wait."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from torch import nn

from alora_kernels.federated import Limits, Outcome, Participant, state
from alora_kernels.federated.config import StrategyConfig
from alora_kernels.federated.model import matrices
from alora_kernels.federated.wire import BEFORE


def go(folder: Path, spoil: dict[str, toy.Change], **changes: object) -> Outcome:
    """A run in which the named clients are changed."""
    config = toy.config(folder, **changes)
    return toy.go(config, spoil, template=toy.template(config))


def trains(train: Callable[[nn.Module], None]) -> toy.Change:
    return lambda p: replace(p, train=train)


def measures(**scores: float) -> toy.Change:
    return lambda p: replace(p, evaluate=lambda _: scores)


def raising(text: str) -> toy.Change:
    def train(model: nn.Module) -> None:
        raise ValueError(text)

    return trains(train)


def diverges(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(1e30)


def is_biased(model: nn.Module) -> None:
    """Within every limit, and wrong: what only a robust strategy helps against."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.9)


class OtherNet(toy.Net):
    """The same function, other names."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1, 1).double()


def of_rank_three(p: Participant) -> Participant:
    return toy.participant(toy.config(Path("other"), rank=3), p.name)


SILENT = "^ValueError, see the client's log$"  # a client's text stays at home
FAULTS = {
    **{f"raises, {name}": (name, raising("row 17: patient John Doe"), SILENT) for name in toy.NAMES},
    "another base model": (
        "bob",
        lambda p: replace(p, base=toy.fingerprint(OtherNet())),
        r"frozen model \(compared by names\).*client bob has",
    ),
    "another rank": (
        "cyd",
        of_rank_three,
        r"^proj.B has shape \(3, 2\), agreed is \(3, 3\)$",
    ),  # what came, what cyd has
    "other metrics": ("ann", measures(f1=1.0), SILENT),
    "a metric that is NaN": ("ann", measures(score=float("nan")), "score.*nan"),
    "no examples": ("ann", lambda p: replace(p, num_examples=0), "num-examples"),
    "negative examples": ("ann", lambda p: replace(p, num_examples=-5), "num-examples"),
    "too many examples": ("ann", lambda p: replace(p, num_examples=10**12), "num-examples"),
    "diverges": ("bob", trains(diverges), "norm"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_who_is_wrong_is_named_and_the_mean_is_the_others(fault, tmp_path):
    name, change, reason = FAULTS[fault]
    outcome = go(tmp_path / "out", {name: change})
    assert (outcome.status, outcome.rounds, len(outcome.rejections)) == ("finished", 3, 3)
    assert all(re.search(reason, event["reason"]) for event in outcome.rejections)
    others = go(tmp_path / "others", {}, clients=[n for n in toy.NAMES if n != name])
    toy.same(outcome.arrays, others.arrays)
    assert "John" not in (tmp_path / "out" / "ledger.jsonl").read_text()


def test_a_client_that_fails_once_is_back_in_the_next_round(tmp_path):
    rounds = iter([True, False, True])

    def sometimes(p: Participant) -> Participant:
        def train(model: nn.Module) -> None:
            if not next(rounds):
                raise MemoryError
            p.train(model)

        return replace(p, train=train)

    outcome = go(tmp_path / "out", {"bob": sometimes})
    assert [(e["round"], e["client"], e["reason"]) for e in outcome.rejections] == [
        (2, "bob", "MemoryError, see the client's log")
    ]
    assert outcome.final.keys() == set(toy.NAMES)


def test_too_few_clients_stop_the_run_with_the_reasons(tmp_path):
    outcome = go(tmp_path / "out", {n: raising("no") for n in ("ann", "bob")}, rounds=9)
    assert (outcome.status, outcome.rounds) == ("stopped", 2)
    assert "3 rounds in a row without a quorum" in str(outcome.reason)
    assert "see the client's log" in str(outcome.reason)
    assert outcome.events[-1] | {"time": 0} == {
        "event": "end", "round": 2, "status": "stopped", "reason": outcome.reason, "time": 0
    }  # fmt: skip
    assert not outcome.arrays["proj.B"].any()  # void rounds leave the arrays alone


def test_fingerprints_see_names_shapes_and_on_request_values():
    net, other = toy.Net(), toy.Net()
    other.proj.weight.data += 1
    assert toy.fingerprint(net) == toy.fingerprint(other)
    assert toy.fingerprint(net, data=True) != toy.fingerprint(other, data=True)
    assert toy.fingerprint(net) != toy.fingerprint(OtherNet())
    assert toy.fingerprint(net) != toy.fingerprint(toy.Net(out_features=2))
    assert toy.fingerprint(net) == toy.fingerprint(toy.Net(head=True), heads=["head"])
    assert toy.fingerprint(net) != toy.fingerprint(toy.Net(head=True))


@pytest.mark.parametrize("name", ["fedmedian", "krum"])
def test_robust_strategies_compose_with_what_the_guard_lets_pass(name, tmp_path):
    gap = {}
    for kind in ("fedavg", name):
        changes = {"strategy": StrategyConfig(name=kind), "rounds": 1, "guard": Limits(quorum=3)}
        clean, spoiled = (
            go(tmp_path / f"{kind}{len(spoil)}", spoil, **changes) for spoil in ({}, {"bob": trains(is_biased)})
        )
        assert spoiled.rejections == []
        gap[kind] = np.abs(clean.arrays["proj.B"] - spoiled.arrays["proj.B"]).max()
    assert gap[name] < gap["fedavg"]


def test_a_name_that_is_nobodys(tmp_path):
    with pytest.raises(ValueError, match="no client 'dan'; the configuration has ann, bob, cyd"):
        toy.config(tmp_path / "out").client("dan")


def test_different_seeds_are_told_apart(tmp_path):
    other = toy.config(tmp_path / "other", seed=1)
    outcome = go(tmp_path / "out", {"ann": lambda _: toy.participant(other, "ann")})
    assert outcome.status == "finished" and outcome.rejections == []  # its own A is its own affair
    assert not np.array_equal(outcome.arrays["proj.B"], go(tmp_path / "plain", {}).arrays["proj.B"])


# ---- what a method trains nowhere stays as it is, whatever evaluation and training do to the model


def everybody(change: toy.Change) -> dict[str, toy.Change]:
    return dict.fromkeys(toy.NAMES, change)


@pytest.mark.parametrize("method", ["fedit", "ffa-lora", "fedsa-lora", "fedsa-vera", "fed-alora", "local"])
def test_an_evaluation_without_the_adapter_changes_nothing(method, tmp_path):
    """It compares with the base model, through PEFT's own context."""
    models: dict[str, list[nn.Module]] = {name: [] for name in toy.NAMES}

    def seen(p: Participant) -> Participant:
        models[p.name].append(p.model)
        return p

    def looks_at_the_base(p: Participant) -> Participant:
        def evaluate(model: nn.Module) -> dict[str, float]:
            with model.disable_adapter():
                p.evaluate(model)
            return dict(p.evaluate(model))

        return replace(seen(p), evaluate=evaluate)

    plain = go(tmp_path / "plain", everybody(seen), method=method)
    looked = go(tmp_path / "looked", everybody(looks_at_the_base), method=method)
    assert looked.status == "finished" and looked.rejections == []
    toy.same(looked.arrays, plain.arrays)
    assert looked.final == plain.final
    spec = toy.config(tmp_path, method).spec
    for both in models.values():
        one, other = (matrices(model, spec) for model in both)
        assert all(torch.equal(one[key].tensor, other[key].tensor) for key in one)


def test_frozen_values_come_back_before_every_round(tmp_path):
    """Whatever an evaluation leaves in the frozen A."""

    def spoils(p: Participant) -> Participant:
        def evaluate(model: nn.Module) -> dict[str, float]:
            scores = dict(p.evaluate(model))
            for key, matrix in matrices(model, toy.config(tmp_path, "ffa-lora").spec).items():
                if key.endswith(".A") and asked.get(p.name):  # after training: the next round begins with it
                    matrix.tensor.data.add_(1.0)
                asked[p.name] = not asked.get(p.name, False)
            return scores

        return replace(p, evaluate=evaluate)

    asked: dict[str, bool] = {}
    plain = go(tmp_path / "plain", {}, method="ffa-lora")
    found = go(tmp_path / "spoilt", everybody(spoils), method="ffa-lora")
    toy.same(found.arrays, plain.arrays)


@pytest.mark.parametrize("method", ["ffa-lora", "fed-alora-het"])
def test_training_that_moves_a_frozen_part_is_refused_by_name(method, tmp_path):
    def drifts(p: Participant) -> Participant:
        def train(model: nn.Module) -> None:
            p.train(model)
            frozen = {"ffa-lora": "lora_A", "fed-alora-het": "lora_B"}[method]
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.removesuffix(".default.weight").endswith(frozen):
                    tensor.data.add_(0.1)

        return replace(p, train=train)

    outcome = go(tmp_path / "out", {"bob": drifts}, method=method, rounds=1)
    (refused,) = outcome.rejections
    assert re.match(rf"client bob: local training changed proj\..*{method}.*disable_adapter", refused["reason"])


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_in_which_nobody_trained_is_not_finished(rounds, tmp_path):
    """All clients are empty, for fewer rounds than patience; with rows, resumed, it is the run it should have been."""
    changes = {"rounds": rounds, "guard": Limits(quorum=2, deadline=30.0, patience=3)}
    outcome = go(tmp_path / "out", everybody(raising("rows must be >= 1, got 0")), **changes)
    assert (outcome.status, outcome.rounds) == ("stopped", 0)
    assert "without a quorum" in str(outcome.reason) and "node 1: ValueError" in str(outcome.reason)
    assert not (tmp_path / "out" / "final.safetensors").exists()
    resumed = toy.go(toy.config(tmp_path / "out", **changes), resume=True)
    whole = go(tmp_path / "whole", {}, **changes)
    assert resumed.status == "finished"
    toy.same(resumed.arrays, whole.arrays)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_strategy_that_makes_no_numbers_stops_the_run_and_leaves_the_last_round(tmp_path):
    """q-FedAvg raises the metric to the power q; the toy's score is below zero, as log-likelihoods are."""
    said = "qfedavg made values that are not finite of the replies of round 1 (proj.B): round 0 is kept"
    options = {"client_learning_rate": 0.1, "q": 0.5, "train_loss_key": f"{BEFORE}score"}
    config = toy.config(tmp_path, strategy=StrategyConfig(name="qfedavg", options=options))
    outcome = toy.go(config)
    assert (outcome.status, outcome.rounds) == ("stopped", 0)
    assert outcome.reason is not None and said in outcome.reason
    assert all(np.isfinite(values).all() for values in state.load(tmp_path).arrays.values())
    assert toy.go(config, resume=True).reason == outcome.reason
