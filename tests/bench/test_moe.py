"""The step over a mixture's experts: each provider is right, a spoilt gradient is seen, what is kept is counted."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.models.experts import ATTENTION, LESS, MODELS, Experts, experts_work, mixture
from bench.models.pair import FUSED, ONE, Setting, judged
from bench.models.training import STOCK
from bench.report.rows import BOTH, EAGER

TINY = Setting("experts", tasks=3, rows=6, tokens=8, answer=7, r=4)
BASE = partial(mixture, torch.float32, width=32, experts=4, layers=2, top=2, inside=16)


@pytest.fixture(scope="module")
def models() -> Experts:
    return Experts(BASE, TINY)


def test_every_provider_is_right():
    work = experts_work(MODELS, BASE, TINY, 32, "")
    for candidate in work.candidates():
        ready = candidate.prepare(BOTH, EAGER)
        assert ready.check.ok and ready.peak_mb and ready.peak_mb > 0, (candidate.name, ready.check)


@pytest.mark.parametrize("name", [FUSED, STOCK])
def test_a_spoilt_gradient_is_seen(models, name):
    results = models.results(name, models.step_of(name)())
    assert len(results) == 1 + 2 * (4 + 2) * 2  # the loss, A and B of four layers and two stacked weights, two blocks
    assert judged(results, models.truth, models.allowed).ok
    spoilt = next(key for key in results if "gate_up_proj B" in key)
    assert judged(results | {spoilt: results[spoilt] * 1.01}, models.truth, models.allowed).where == spoilt


def test_less_is_kept_than_by_stock_experts(models):
    """Storages, not time: the same on every machine."""
    kept = {name: models.kept_mb(name) for name in (FUSED, ONE, ATTENTION)}
    assert kept[ATTENTION] < kept[FUSED] < kept[ONE]
    assert LESS.keys() <= set(MODELS)
