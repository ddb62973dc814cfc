"""Every provider of this machine computes what it says it computes; the judge sees what is wrong."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch

from bench.layers import problem as problems
from bench.layers.layer import Layer
from bench.layers.problem import Case, Problem
from bench.layers.providers import PROVIDERS, find
from bench.report.rows import BOTH, FORWARD, PASSES

SMALL = {"m": 48, "k": 24, "n": 40, "r": 4, "e": 6}


def _runnable() -> list[tuple[str, str, str, str]]:
    """Every provider that runs on CPUs, for each routing, layout and pass that it has."""
    return [
        (name, routing, layout, direction)
        for name, provider in PROVIDERS.items()
        for routing, layout in (("task", "runs"), ("task", "rows"), ("soft", "runs"))
        for direction in PASSES
        if routing in provider.computes and (provider.trains or direction == FORWARD)
        if provider.missing(Case("small", routing, **SMALL, layout=layout)) is None
    ]


def test_what_runs_on_cpus():
    elsewhere = {"plain Triton GEMM", "LoRAFusion", "vLLM", "SGLang"}
    if shutil.which("g++") is None:
        elsewhere |= {"hoisted compiled"}
    on_gpus = elsewhere | {name for name in PROVIDERS if name.startswith("fused:")}
    assert PROVIDERS.keys() - {name for name, *_ in _runnable()} == on_gpus
    case = Case("small", "task", **SMALL)
    assert all(PROVIDERS[name].missing(case) for name in on_gpus)


@pytest.mark.parametrize(("name", "routing", "layout", "direction"), _runnable())
def test_it_computes_its_function(name, routing, layout, direction):
    provider = PROVIDERS[name]
    p = Problem(Case("small", routing, **SMALL, layout=layout))
    layer = provider.build(p)
    got = layer.named(layer.step(direction, p.tensor("dy"))())
    assert (len(got) > 1) == (direction == BOTH)
    check = p.check(provider.computes[routing], got, gradients=direction == BOTH)
    assert check.ok, check


@pytest.mark.parametrize("name", ["fused", "hoisted", "authors' loop", "PEFT LoRA", "PEFT Poly", "Unsloth-style addmm"])
def test_it_does_so_in_bf16(name):
    p = Problem(Case("small", "task", **SMALL, dtype=torch.bfloat16))
    provider = PROVIDERS[name]
    layer = provider.build(p)
    check = p.check(provider.computes["task"], layer.named(layer.step(BOTH, p.tensor("dy"))()), gradients=True)
    assert check.ok, check


def test_foreign_kernels_say_why_they_are_not_here():
    case = Case("small", "task", m=512, k=24, n=40, r=4, e=4)
    for name in ("LoRAFusion", "vLLM", "SGLang"):
        assert "not installed" in PROVIDERS[name].missing(case) or "CUDA" in PROVIDERS[name].missing(case)
    assert "at most 4 adapters" in PROVIDERS["LoRAFusion"].missing(dataclasses.replace(case, e=8))


def test_an_unknown_provider_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="'nobody'.*frozen.*HydraLoRA"):
        find(["fused", "nobody"])
    assert [p.name for p in find(["hoisted", "frozen"])] == ["frozen", "hoisted"]


def _fused(routing: str = "task") -> tuple[Problem, dict[str, torch.Tensor]]:
    p = Problem(Case("small", routing, **SMALL))
    layer = PROVIDERS["fused"].build(p)
    return p, layer.named(layer.step(BOTH, p.tensor("dy"))())


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("spoil", [lambda t: t * 1.0001, lambda t: t * math.nan, torch.Tensor.double, lambda t: t[:-1]])
def test_the_judge_sees_every_spoilt_tensor(routing, spoil):
    p, good = _fused(routing)
    assert p.check(routing, good, gradients=True).ok
    for name, tensor in good.items():
        check = p.check(routing, good | {name: spoil(tensor)}, gradients=True)
        assert not check.ok
        assert check.where == name


def test_the_judge_misses_no_gradient():
    p, good = _fused()
    assert not p.check("task", {"y": good["y"]}, gradients=True).ok
    assert p.check("task", {"y": good["y"]}, gradients=False).ok


@pytest.mark.parametrize("function", ["task", "soft", "hydra", "poly"])
def test_a_truth_in_chunks_is_the_truth(function, monkeypatch):
    whole = Problem(Case("small", "task", **SMALL))._formula(function, True, torch.float64)
    monkeypatch.setattr(problems, "CHUNK_BYTES", 5 * 3 * 40 * 8)  # five sequences of three tokens at a time
    parts = Problem(Case("small", "task", **SMALL))._formula(function, True, torch.float64)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-12, atol=1e-12)


def test_layouts():
    runs = Problem(Case("small", "task", m=64, k=4, n=4, r=2, e=4))
    assert runs.ids.tolist() == [t for t in range(4) for _ in range(4)]  # 16 sequences of 4 tokens, sorted by task
    rows = Problem(Case("small", "task", m=32, k=4, n=4, r=2, e=32, layout="rows"))
    assert sorted(rows.ids.tolist()) == list(range(32)) != rows.ids.tolist()
    many = Problem(Case("small", "task", m=64, k=4, n=4, r=2, e=64))
    assert many.ids.tolist() == list(range(64))


@pytest.mark.parametrize(("letter", "value"), [("m", 24), ("e", 0), ("r", -1)])
def test_a_case_that_cannot_be_is_refused_by_its_letter(letter, value):
    with pytest.raises(ValueError, match=f"^{letter} must"):
        Case("small", "task", **SMALL | {letter: value})


def test_data_is_the_same_each_time_and_never_zero():
    case = Case("small", "soft", **SMALL)
    for name in ("x", "dy", "w", "a", "b", "router"):
        one, two = Problem(case).tensor(name), Problem(case).tensor(name)
        assert torch.equal(one, two)
        assert bool((one != 0).all())


def test_inference_keeps_nothing_for_a_backward():
    p = Problem(Case("small", "task", **SMALL))
    x = p.tensor("x")
    layer = Layer(lambda: x * 2, [x], lambda grads: {"x": grads[0]})
    assert layer.step(FORWARD, p.tensor("dy"))()[0].grad_fn is None
