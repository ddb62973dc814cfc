"""Whole models: training and decoding steps give float64's loss, gradients and logits, and a spoilt one is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models import decoding, training
from bench.models.pair import FROZEN, FUSED, ONE, ModelWork, Setting, eight_billion, judged, llama
from bench.models.training import MODELS, STOCK, training_work
from bench.report.rows import BOTH, EAGER, FORWARD, GRAPH


def tiny() -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return llama(**shape, intermediate_size=48, vocab_size=64)


@pytest.fixture(scope="module")
def work() -> ModelWork:
    return training_work(base=tiny)


def test_both_models_are_right(work):
    for candidate in work.candidates():
        ready = candidate.prepare(BOTH, EAGER)
        assert ready.check.ok, (candidate.name, ready.check)
    assert [candidate.name for candidate in work.candidates()] == list(MODELS)


@pytest.mark.parametrize("name", [name for name in MODELS if name != ONE])  # which computes less
def test_a_spoilt_gradient_is_seen(work, name):
    models = work.models
    results = models.results(name, models.step_of(name)())
    assert len(results) == 1 + 2 * 14  # the loss, A and B of seven layers in each of two blocks
    assert judged(results, models.truth, models.allowed).ok
    for spoilt in list(results)[:3]:
        check = judged(results | {spoilt: results[spoilt] * 1.01}, models.truth, models.allowed)
        assert not check.ok
        assert check.where == spoilt


def test_steps_do_not_accumulate(work):
    models = work.models
    for name in (FUSED, STOCK):
        first = {k: t.clone() for k, t in models.results(name, models.step_of(name)()).items()}
        again = models.results(name, models.step_of(name)())
        assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("cached", [True, False])
def test_the_row_says_which_weights(cached, monkeypatch):
    monkeypatch.setattr(training, "in_cache", lambda: cached)
    assert ("random weights" in training_work().row.note) == (not cached)


def test_the_frozen_model_is_beside_them_and_no_step_is_captured():
    (frozen,) = training_work((FROZEN,), base=tiny).candidates()
    assert frozen.computes == "frozen" and frozen.prepare(BOTH, EAGER).check.ok
    assert "eager" in str(frozen.reason(BOTH, GRAPH)) and frozen.reason(BOTH, EAGER) is None
    assert not any(p.grad is not None for p in frozen._models.frozen.parameters())


@pytest.fixture(scope="module")
def decode() -> ModelWork:
    return decoding.decoding_work(
        decoding.MODELS, tiny, Setting("model decode", tasks=5, rows=5, tokens=9), width=32, note=""
    )


def test_every_request_decodes_under_its_own_task(decode):
    assert decode.row.m == 5 and decode.row.e == 5
    for candidate in decode.candidates():
        assert candidate.reason(FORWARD, EAGER) is None
        ready = candidate.prepare(FORWARD, EAGER)
        assert ready.check.ok, (candidate.name, ready.check)
        first, again = (ready.run()[0] for _ in range(2))
        assert torch.equal(first, again)  # the same work at every call
    models = decode.models
    right = models.step_of(FUSED)()[0]
    base = models.step_of(FROZEN)()[0]
    assert not models.check(FUSED, [base]).ok
    assert not models.check(FUSED, [right.roll(1, 0)]).ok
    assert not models.check(FUSED, [right * float("nan")]).ok


def test_an_eight_billion_shape_has_its_parameters():
    model = eight_billion(32, "meta")()
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
