"""Clients that fail or differ: a clear reason in the ledger, the mean of the others, and an end instead of a wait."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy
from torch import nn

from alora_kernels.federated import Limits, Outcome, Participant
from alora_kernels.federated.config import StrategyConfig


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
    "raises, ann": ("ann", raising("row 17: patient John Doe"), SILENT),
    "raises, bob": ("bob", raising("row 17: patient John Doe"), SILENT),
    "raises, cyd": ("cyd", raising("row 17: patient John Doe"), SILENT),
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
