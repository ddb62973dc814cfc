"""Whole models: training and decoding steps give float64's loss, gradients and logits, and a spoilt one is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models import training
from bench.models.decoding import MODELS as DECODING
from bench.models.decoding import Decoding
from bench.models.pair import FROZEN, FUSED, ONE, Setting, eight_billion, judged, llama, model_work
from bench.models.training import MODELS, SMALL, STOCK, Training
from bench.report.rows import BOTH, EAGER, FORWARD, GRAPH


def tiny() -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return llama(**shape, intermediate_size=48, vocab_size=64)


@pytest.fixture(scope="module")
def models() -> Training:
    return Training(tiny, SMALL)


def test_both_models_are_right(models):
    work = model_work(MODELS, models, width=32, note="")
    for candidate in work.candidates():
        ready = candidate.prepare(BOTH, EAGER)
        assert ready.check.ok, (candidate.name, ready.check)
    assert [candidate.name for candidate in work.candidates()] == list(MODELS)


@pytest.mark.parametrize("name", [name for name in MODELS if name != ONE])  # which computes less
def test_a_spoilt_gradient_is_seen(models, name):
    results = models.results(name, models.step_of(name)())
    assert len(results) == 1 + 2 * 14  # the loss, A and B of seven layers in each of two blocks
    assert judged(results, models.truth, models.allowed).ok
    for spoilt in list(results)[:3]:
        check = judged(results | {spoilt: results[spoilt] * 1.01}, models.truth, models.allowed)
        assert not check.ok
        assert check.where == spoilt


def test_steps_do_not_accumulate(models):
    for name in (FUSED, STOCK):
        first = {k: t.clone() for k, t in models.results(name, models.step_of(name)()).items()}
        again = models.results(name, models.step_of(name)())
        assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("cached", [True, False])
def test_the_row_says_which_weights(cached, monkeypatch):
    monkeypatch.setattr(training, "in_cache", lambda: cached)
    assert ("random weights" in training.smollm_note()) == (not cached)


def test_the_frozen_model_is_beside_them_and_no_step_is_captured():
    models = Training(tiny, SMALL)
    (frozen,) = model_work([FROZEN], models, width=32, note="").candidates()
    assert frozen.computes == "frozen" and frozen.prepare(BOTH, EAGER).check.ok
    assert "eager" in str(frozen.reason(BOTH, GRAPH)) and frozen.reason(BOTH, EAGER) is None
    assert not any(p.grad is not None for p in models.frozen.parameters())


def test_every_request_decodes_under_its_own_task():
    models = Decoding(tiny, Setting("model decode", tasks=5, rows=5, tokens=9))
    decode = model_work(DECODING, models, width=32, note="")
    assert decode.row.m == 5 and decode.row.e == 5
    for candidate in decode.candidates():
        assert candidate.reason(FORWARD, EAGER) is None
        ready = candidate.prepare(FORWARD, EAGER)
        assert ready.check.ok, (candidate.name, ready.check)
        first, again = (ready.run()[0] for _ in range(2))
        assert torch.equal(first, again)  # the same work at every call
    right = models.step_of(FUSED)()[0]
    base = models.step_of(FROZEN)()[0]
    assert not models.check(FUSED, [base]).ok
    assert not models.check(FUSED, [right.roll(1, 0)]).ok
    assert not models.check(FUSED, [right * float("nan")]).ok


def test_an_eight_billion_shape_has_its_parameters():
    model = eight_billion(32, "meta")()
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
