"""What a method trains nowhere stays as it is, whatever evaluation and training do to the model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from alora_kernels.federated import Limits, Participant
from alora_kernels.federated.log import Outcome
from alora_kernels.federated.model import matrices


def go(folder: Path, method: str, change: Any = None, **changes: object) -> tuple[Outcome, dict[str, Participant]]:
    """A run with its participants, all of them changed."""
    made: dict[str, Participant] = {}

    def make(p: Participant) -> Participant:
        made[p.name] = p if change is None else change(p)
        return made[p.name]

    return toy.go(toy.config(folder, method, **changes), dict.fromkeys(toy.NAMES, make)), made


def looks_at_the_base(p: Participant) -> Participant:
    """Its evaluation compares with the base model, through PEFT's own context."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        with model.disable_adapter():
            p.evaluate(model)
        return dict(p.evaluate(model))

    return replace(p, evaluate=evaluate)


@pytest.mark.parametrize("method", ["fedit", "ffa-lora", "fedsa-lora", "fedsa-vera", "fed-alora", "local"])
def test_an_evaluation_without_the_adapter_changes_nothing(method: str, tmp_path: Path) -> None:
    plain, first = go(tmp_path / "plain", method)
    looked, second = go(tmp_path / "looked", method, looks_at_the_base)
    assert looked.status == "finished" and looked.rejections == []
    toy.same(looked.arrays, plain.arrays)
    assert looked.final == plain.final
    spec = toy.config(tmp_path, method).spec
    for name in toy.NAMES:
        one, other = (matrices(made[name].model, spec) for made in (first, second))
        assert all(torch.equal(one[key].tensor, other[key].tensor) for key in one)


def test_frozen_values_come_back_before_every_round(tmp_path: Path) -> None:
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
    plain, _ = go(tmp_path / "plain", "ffa-lora")
    found, _ = go(tmp_path / "spoilt", "ffa-lora", spoils)
    toy.same(found.arrays, plain.arrays)


@pytest.mark.parametrize("method", ["ffa-lora", "fed-alora-het"])
def test_training_that_moves_a_frozen_part_is_refused_by_name(method: str, tmp_path: Path) -> None:
    def drifts(p: Participant) -> Participant:
        def train(model: nn.Module) -> None:
            p.train(model)
            frozen = {"ffa-lora": "lora_A", "fed-alora-het": "lora_B"}[method]
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.removesuffix(".default.weight").endswith(frozen):
                    tensor.data.add_(0.1)

        return replace(p, train=train) if p.name == "bob" else p

    outcome, _ = go(tmp_path / "out", method, drifts, rounds=1)
    (refused,) = outcome.rejections
    assert re.match(rf"client bob: local training changed proj\..*{method}.*disable_adapter", refused["reason"])


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_in_which_nobody_trained_is_not_finished(rounds: int, tmp_path: Path) -> None:
    """All clients are empty, for fewer rounds than patience; with rows, resumed, it is the run it should have been."""

    def empty(p: Participant) -> Participant:
        def train(model: nn.Module) -> None:
            raise ValueError("rows must be >= 1, got 0")

        return replace(p, train=train)

    limits = Limits(quorum=2, deadline=30.0, patience=3)
    outcome, _ = go(tmp_path / "out", "fed-alora", empty, rounds=rounds, guard=limits)
    assert (outcome.status, outcome.rounds) == ("stopped", 0)
    assert "without a quorum" in str(outcome.reason) and "node 1: ValueError" in str(outcome.reason)
    assert not (tmp_path / "out" / "final.safetensors").exists()
    resumed = toy.go(toy.config(tmp_path / "out", rounds=rounds, guard=limits), resume=True)
    whole, _ = go(tmp_path / "whole", "fed-alora", rounds=rounds, guard=limits)
    assert resumed.status == "finished"
    toy.same(resumed.arrays, whole.arrays)
