"""Clients that fail or differ: a clear reason in the ledger, the mean of the others, and an end instead of a wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy
from torch import nn

from alora_kernels.federated import FedConfig, Limits, Participant, run
from alora_kernels.federated.config import StrategyConfig
from alora_kernels.federated.log import Outcome

LR = 0.02
Change = Callable[[Participant], Participant]


def go(folder: Path, spoil: dict[str, Change], **changes: object) -> Outcome:
    """A run in which the named clients are changed."""
    config = toy.config(folder, **changes)

    def make(name: str) -> Participant:
        return spoil.get(name, lambda p: p)(toy.participant(config, name, lr=LR))

    return run(config, make, template=toy.template(config))


def reasons(outcome: Outcome) -> set[str]:
    return {e["reason"] for e in outcome.rejections}


def only(folder: Path, *names: str) -> dict[str, np.ndarray]:
    """What the named clients alone would have learned."""
    return go(folder, {}, clients=list(names)).arrays


def raising(text: str) -> Change:
    def train(model: nn.Module) -> None:
        raise ValueError(text)

    return lambda p: replace(p, train=train)


@pytest.mark.parametrize("name", toy.NAMES)
def test_a_client_that_raises_is_left_out_and_its_text_stays_at_home(name, tmp_path):
    outcome = go(tmp_path / "out", {name: raising("row 17: patient John Doe")})
    assert outcome.status == "finished" and outcome.rounds == 3
    assert reasons(outcome) == {"ValueError, see the client's log"}
    others = only(tmp_path / "others", *(n for n in toy.NAMES if n != name))
    np.testing.assert_array_equal(outcome.arrays["proj.B"], others["proj.B"])
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


class OtherNet(toy.Net):
    """The same function, other names."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1, 1).double()


def test_another_base_model_is_named(tmp_path):
    def swap(p: Participant) -> Participant:
        return replace(p, base=toy.fingerprint(OtherNet()))

    outcome = go(tmp_path / "out", {"bob": swap})
    [reason] = reasons(outcome)
    assert "frozen model (compared by names)" in reason and "client bob has" in reason
    others = only(tmp_path / "others", "ann", "cyd")
    np.testing.assert_array_equal(outcome.arrays["proj.B"], others["proj.B"])


def test_fingerprints_see_names_shapes_and_on_request_values():
    net, other = toy.Net(), toy.Net()
    other.proj.weight.data += 1
    assert toy.fingerprint(net) == toy.fingerprint(other)
    assert toy.fingerprint(net, data=True) != toy.fingerprint(other, data=True)
    assert toy.fingerprint(net) != toy.fingerprint(OtherNet())
    assert toy.fingerprint(net) != toy.fingerprint(toy.Net(out_features=2))
    assert toy.fingerprint(net) == toy.fingerprint(toy.Net(head=True), heads=["head"])
    assert toy.fingerprint(net) != toy.fingerprint(toy.Net(head=True))


def test_another_rank_under_a_method_of_one_rank(tmp_path):
    config = toy.config(tmp_path / "other", rank=3)
    outcome = go(tmp_path / "out", {"cyd": lambda _: toy.participant(config, "cyd")})
    assert reasons(outcome) == {"proj.B has shape (3, 2), agreed is (3, 3)"}  # what came, and what cyd has
    others = only(tmp_path / "others", "ann", "bob")
    np.testing.assert_array_equal(outcome.arrays["proj.B"], others["proj.B"])


def test_metrics_that_are_not_the_configurations(tmp_path):
    outcome = go(tmp_path / "out", {"ann": lambda p: replace(p, evaluate=lambda _: {"f1": 1.0})})
    assert reasons(outcome) == {"ValueError, see the client's log"}


def test_a_metric_that_is_nan(tmp_path):
    outcome = go(tmp_path / "out", {"ann": lambda p: replace(p, evaluate=lambda _: {"score": float("nan")})})
    assert len(outcome.rejections) == 3 and all("score" in r and "nan" in r for r in reasons(outcome))


@pytest.mark.parametrize("examples", [0, -5, 10**12])
def test_impossible_numbers_of_examples(examples, tmp_path):
    outcome = go(tmp_path / "out", {"ann": lambda p: replace(p, num_examples=examples)})
    assert len(outcome.rejections) == 3 and all("num-examples" in r for r in reasons(outcome))


def diverging(p: Participant) -> Participant:
    def train(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(1e30)

    return replace(p, train=train)


def test_a_client_that_diverges_does_not_spoil_the_mean(tmp_path):
    outcome = go(tmp_path / "out", {"bob": diverging})
    assert len(outcome.rejections) == 3
    others = only(tmp_path / "others", "ann", "cyd")
    np.testing.assert_array_equal(outcome.arrays["proj.B"], others["proj.B"])


def biased(p: Participant) -> Participant:
    """Within every limit, and wrong: what only a robust strategy helps against."""

    def train(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.9)

    return replace(p, train=train)


@pytest.mark.parametrize("name", ["fedmedian", "krum"])
def test_robust_strategies_compose_with_what_the_guard_lets_pass(name, tmp_path):
    gap = {}
    for kind in ("fedavg", name):
        changes = {"strategy": StrategyConfig(name=kind), "rounds": 1, "guard": Limits(quorum=3)}
        clean, spoiled = (
            go(tmp_path / f"{kind}{len(spoil)}", spoil, **changes) for spoil in ({}, {"bob": biased})
        )  # fmt: skip
        assert spoiled.rejections == []
        gap[kind] = np.abs(clean.arrays["proj.B"] - spoiled.arrays["proj.B"]).max()
    assert gap[name] < gap["fedavg"]


def test_a_name_that_is_nobodys(tmp_path):
    config = toy.config(tmp_path / "out")
    with pytest.raises(ValueError, match="no client 'dan'; the configuration has ann, bob, cyd"):
        config.client("dan")


def test_quorum_of_more_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="can never be reached"):
        toy.config(tmp_path, guard=Limits(quorum=4))


def test_different_seeds_are_told_apart(tmp_path):
    other: FedConfig = toy.config(tmp_path / "other", seed=1)
    outcome = go(tmp_path / "out", {"ann": lambda _: toy.participant(other, "ann")})
    assert outcome.status == "finished" and outcome.rejections == []  # its own A is its own affair
    assert not np.array_equal(outcome.arrays["proj.B"], go(tmp_path / "plain", {}).arrays["proj.B"])
