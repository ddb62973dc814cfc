"""The training step: both models give the float64 loss and gradients, and a spoilt one is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import training
from bench.layers import BOTH
from bench.rows import EAGER
from bench.training import FUSED, MODELS, STOCK, TrainingWork


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def work() -> TrainingWork:
    return TrainingWork(base=tiny)


def test_both_models_are_right(work):
    for candidate in work.candidates():
        ready = candidate.prepare(BOTH, EAGER)
        assert ready.check.ok, (candidate.name, ready.check)
    assert [candidate.name for candidate in work.candidates()] == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_spoilt_gradient_is_seen(work, name):
    models = work._models
    results = models.results(name, models.step(name))
    assert len(results) == 1 + 2 * 14  # the loss, A and B of seven layers in each of two blocks
    assert models.check(results).ok
    for spoilt in list(results)[:3]:
        check = models.check(results | {spoilt: results[spoilt] * 1.01})
        assert not check.ok
        assert check.where == spoilt


def test_steps_do_not_accumulate(work):
    models = work._models
    for name in (FUSED, STOCK):
        first = {k: t.clone() for k, t in models.results(name, models.step(name)).items()}
        again = models.results(name, models.step(name))
        assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("cached", [True, False])
def test_the_row_says_which_weights(cached, monkeypatch):
    monkeypatch.setattr(training, "in_cache", lambda: cached)
    assert ("random weights" in TrainingWork().row.note) == (not cached)
