"""Planted conflicts come back out, each pair counted once; measuring gradients leaves tiny models as they were."""

from __future__ import annotations

import importlib
import inspect
import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from alora_kernels import FusedALoRALinear, analysis, route
from alora_kernels.analysis import NotFiniteError, compare, task_conflicts, task_gradients
from alora_kernels.data import load_model
from alora_kernels.tuner import ALoRAConfig

from ..support import mixtures
from ..support.refusals import refused
from .adapters import randn64 as randn

TASKS = ["copy", "next", "zero"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opposite_gradients_conflict(dtype, device):
    g = randn(4, 6).to(device, dtype)
    got = compare({"x": g, "y": -2 * g}, module="layer", parameter="B")
    assert (got.pairs, got.conflicts, got.shared, got.sharing) == (1, 1, True, "shared")
    torch.testing.assert_close(got.cosine, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))
    assert got.norms == pytest.approx((float(g.double().norm()), 2 * float(g.double().norm())))
    assert got.norm == pytest.approx(1.5 * float(g.double().norm()))
    assert (got.module, got.parameter, got.tasks) == ("layer", "B", ("x", "y"))


def test_orthogonal_and_equal_gradients_do_not_conflict():
    one = torch.tensor([[1.0, 1.0]])
    for other, cosine in ((torch.tensor([[1.0, -1.0]]), 0.0), (3 * one, pytest.approx(1.0))):
        got = compare({"x": one, "y": other})
        assert (got.conflicts, got.cosine[0, 1]) == (0, cosine)


@pytest.mark.parametrize("degrees", [1, 60, 89, 91, 120, 179])
def test_a_planted_angle_comes_back(degrees):
    basis = torch.linalg.qr(randn(12, 12)).Q
    theta = math.radians(degrees)
    got = compare({"x": basis[0] * 5, "y": math.cos(theta) * basis[0] + math.sin(theta) * basis[1]})
    assert got.cosine[0, 1] == pytest.approx(math.cos(theta), abs=1e-14)
    assert got.conflicts == (degrees > 90)


def test_mixtures_count_each_pair_once():
    e = torch.eye(3, dtype=torch.float64)
    gradients = {"a": e[0], "b": -e[0] + e[1], "c": e[1], "d": -e[1], "e": e[2]}
    got = compare(gradients)
    conflicting = {("a", "b"), ("b", "d"), ("c", "d")}
    found = {(s, t) for i, s in enumerate(gradients) for j, t in enumerate(gradients) if i < j and got.cosine[i, j] < 0}
    assert found == conflicting
    assert (got.pairs, got.conflicts) == (10, 3)
    assert got.cosine[0, 1] == pytest.approx(-math.sqrt(0.5))


def test_a_gradient_of_zero_is_no_pair():
    g = randn(3, 4)
    got = compare({"x": g, "y": 0 * g, "z": -g})
    assert (got.pairs, got.conflicts) == (1, 1)
    assert got.cosine[1].isnan().all() and got.norms[1] == 0.0
    assert got.shared


def test_slices_of_their_own_never_meet_unless_two_tasks_train_one():
    g = randn(2, 5)
    stacks = torch.zeros(4, 3, 2, 5, dtype=torch.float64)  # four data sets on a stack of three
    stacks[0, 0], stacks[1, 1], stacks[2, 2], stacks[3, 2] = g, -g, g, -g
    apart = compare({"a": stacks[0], "b": stacks[1], "c": stacks[2]}, routed=True)
    assert (apart.pairs, apart.conflicts, apart.sharing) == (0, 0, "per task")
    assert apart.norms == pytest.approx([float(g.norm())] * 3)
    assert torch.equal(apart.cosine.isnan(), ~torch.eye(3, dtype=torch.bool))
    same = compare(dict(zip("abcd", stacks)), routed=True)
    assert (same.pairs, same.conflicts, same.sharing) == (1, 1, "shared")
    unrouted = compare({"a": stacks[0], "b": stacks[1]})
    assert (unrouted.pairs, unrouted.conflicts, unrouted.sharing) == (1, 0, "shared")


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.integers(2, 5), n=st.integers(1, 5), seed=st.integers(0, 2**16),
    scales=st.lists(st.floats(1e-30, 1e30), min_size=5, max_size=5),
)  # fmt: skip
def test_invariances(tasks, n, seed, scales):
    gradients = {f"t{i}": randn(n, 4, seed=seed + i) for i in range(tasks)}
    got = compare(gradients)
    assert got.pairs == tasks * (tasks - 1) // 2
    assert torch.equal(got.cosine, got.cosine.T) or torch.allclose(got.cosine, got.cosine.T, atol=1e-15)
    scaled = compare({t: g * s for (t, g), s in zip(gradients.items(), scales)})
    torch.testing.assert_close(scaled.cosine, got.cosine, rtol=0, atol=1e-12)
    rotation = torch.linalg.qr(randn(n, n, seed=seed + 99)).Q
    turned = compare({t: rotation @ g for t, g in gradients.items()})
    torch.testing.assert_close(turned.cosine, got.cosine, rtol=0, atol=1e-12)
    assert turned.norms == pytest.approx(got.norms, rel=1e-10)
    opposite = compare({t: (-1) ** i * g for i, (t, g) in enumerate(gradients.items())})
    signs = torch.tensor([(-1.0) ** i for i in range(tasks)], dtype=torch.float64)
    torch.testing.assert_close(opposite.cosine, got.cosine * signs * signs[:, None], rtol=0, atol=1e-14)


def test_compare_names_what_is_wrong():
    g = randn(2, 3)
    for too_few, named in (({}, "none"), ({"only": g}, "only")):
        refused(f"at least two, got {named}", compare, too_few)
    refused(r"one shape, got \{'x': \[2, 3\], 'y': \[3, 2\]\}", compare, {"x": g, "y": g.T})
    with pytest.raises(NotFiniteError, match=r"layers.3.q_proj B not finite: \['y'\]"):
        compare({"x": g, "y": g * float("nan")}, module="layers.3.q_proj", parameter="B")


def test_a_graph_behind_the_gradients_stays_out():
    g = randn(2, 3).requires_grad_()
    assert not compare({"x": g, "y": 2 * g}).cosine.requires_grad


class Toy(nn.Module):
    """y = B A x with numpy's, Python's and torch's random numbers drawn on the way, and dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(randn(2, 3))
        self.lora_B = nn.Parameter(randn(4, 2, seed=1))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        return self.scale * self.drop(x @ self.lora_A.T) @ self.lora_B.T


def towards(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) * batch["target"]).sum()


def toy_batches() -> dict[str, dict[str, Tensor]]:
    x, target = randn(5, 3, seed=2), randn(5, 4, seed=3)
    return {"up": {"x": x, "target": target}, "down": {"x": x, "target": -target}}


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Gradients, modes and random states, as what can be compared."""
    grads = {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()}
    _, key, place, *_ = np.random.get_state()
    modes = [m.training for m in model.modules()]
    return grads, modes, torch.get_rng_state().tolist(), random.getstate(), key.tolist(), place


def test_gradients_are_those_of_eval_mode_by_hand():
    model, batches = Toy(), toy_batches()
    got = task_gradients(model, batches, towards)
    assert list(got) == ["lora_A", "lora_B"]  # `scale` is no matrix of an adapter
    x, target = batches["up"]["x"], batches["up"]["target"]
    torch.testing.assert_close(got["lora_B"]["up"], target.T @ (x @ model.lora_A.T).detach())
    torch.testing.assert_close(got["lora_A"]["up"], (target @ model.lora_B).T.detach() @ x)
    torch.testing.assert_close(got["lora_A"]["down"], -got["lora_A"]["up"])
    records = task_conflicts(model, batches, towards)
    assert [(r.module, r.parameter, r.pairs, r.conflicts) for r in records] == [("", "A", 1, 1), ("", "B", 1, 1)]
    assert list(task_gradients(model, batches, towards, ["scale"])) == ["scale"]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_found(fails):
    model = Toy().train()
    model.drop.eval()  # modes that no single train() would restore
    towards(model, toy_batches()["up"]).backward()
    model.lora_B.grad = None

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert not any(m.training for m in model.modules()) and torch.is_grad_enabled()
        value = towards(model, batch)
        if fails:
            raise RuntimeError("on purpose")
        return value

    before = state_of(model)
    failing = pytest.raises(RuntimeError, match="on purpose") if fails else nullcontext()
    with torch.no_grad(), failing:  # a caller may be inside one
        task_gradients(model, toy_batches(), loss)
    assert state_of(model) == before
    assert model.lora_A.grad is not None and model.lora_B.grad is None


def test_the_batches_are_left_as_they_are():
    batches = toy_batches()

    def pops(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"]) * batch.pop("target")).sum()

    task_gradients(Toy(), batches, pops)
    assert all(set(batch) == {"x", "target"} for batch in batches.values())


def test_a_loss_that_does_not_reach_a_matrix_has_a_gradient_of_zero():
    model, batches = Toy(), toy_batches()
    got = task_gradients(model, batches, lambda m, b: m.lora_A.sum())
    assert torch.equal(got["lora_B"]["up"], torch.zeros(4, 2, dtype=torch.float64))
    got = task_gradients(model, batches, lambda m, b: torch.ones(()))  # nothing of the adapter at all
    assert not got["lora_A"]["up"].any()


def test_task_gradients_name_what_is_wrong():
    model, batches = Toy(), toy_batches()
    refused("batches is empty", task_gradients, model, {}, towards)
    unknown = r"trainable parameters of the model, got \['lora_C'\]"
    refused(unknown, task_gradients, model, batches, towards, ["lora_A", "lora_C"])
    refused(r"for task 'up' it returned shape \[5, 4\]", task_gradients, model, batches, lambda m, b: m(b["x"]))
    refused("it returned float", task_gradients, model, batches, lambda m, b: 1.0)
    refused("no trainable asymlora_A/B", task_gradients, nn.Linear(2, 2), batches, towards)
    with pytest.raises(ValueError, match="at least two, got up"):
        task_conflicts(model, {"up": batches["up"]}, lambda m, b: pytest.fail("computed in vain"))
    model.lora_A.requires_grad_(False)
    refused(r"got \['lora_A'\]", task_gradients, model, batches, towards, ["lora_A"])
    batches["down"]["target"] = batches["down"]["target"] * float("nan")
    before = state_of(model)
    refused(r"infinity: lora_B \(down\)$", task_gradients, model, batches, towards, error=NotFiniteError)
    assert state_of(model) == before


def stack(**kind: Any) -> nn.Module:
    """Two layers of the drop-in layer, B not zero so that A has a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(FusedALoRALinear(6, 8, 2, **kind), FusedALoRALinear(8, 4, 3, **kind))
    for layer in model:
        nn.init.normal_(layer.lora_B)
    return model


def stack_batches() -> dict[str, dict[str, Tensor]]:
    return {t: {"x": torch.randn(5, 6), "ids": torch.full((5,), i)} for i, t in enumerate(TASKS)}


def routed_loss(model: nn.Module, batch: Any) -> Tensor:
    with route(batch["ids"]):
        return model(batch["x"]).square().sum()


def test_a_is_per_task_under_task_routing_and_shared_under_soft_routing():
    batches = stack_batches()
    model = stack(tasks=TASKS)
    gradients = task_gradients(model, batches, routed_loss)
    for i, task in enumerate(TASKS):  # only slice i learns from task i
        reached = gradients["0.lora_A"][task].abs().sum((1, 2)) > 0
        assert reached.tolist() == [j == i for j in range(3)]
    got = {(r.module, r.parameter): (r.sharing, r.pairs) for r in task_conflicts(model, batches, routed_loss)}
    assert got == {(m, p): (s, n) for m in "01" for p, s, n in (("A", "per task", 0), ("B", "shared", 3))}
    soft = task_conflicts(stack(num_experts=3), batches, lambda m, b: m(b["x"]).square().sum())
    assert {(r.parameter, r.sharing, r.pairs) for r in soft} == {("A", "shared", 3), ("B", "shared", 3)}
    single = task_conflicts(stack(tasks=["all"]), batches, lambda m, b: m(b["x"]).square().sum())
    assert {(r.parameter, r.sharing, r.pairs) for r in single} == {("A", "shared", 3), ("B", "shared", 3)}


def test_what_is_shared_is_known_before_there_are_gradients():
    """B is zero, so A has none yet."""

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"]).sum()

    for kind in ({"tasks": ["all"]}, {"num_experts": 3}):
        layer = FusedALoRALinear(6, 4, 2, **kind)  # the whole model: its names have no prefix
        got = task_conflicts(layer, stack_batches(), plain)
        assert [(r.module, r.parameter, r.sharing, r.pairs) for r in got] == [
            ("", "A", "shared", 0), ("", "B", "shared", 3)
        ]  # fmt: skip
    routed = task_conflicts(FusedALoRALinear(6, 4, 2, tasks=TASKS), stack_batches(), routed_loss)
    assert [(r.parameter, r.sharing, r.pairs) for r in routed] == [("A", "per task", 0), ("B", "shared", 3)]


@pytest.mark.parametrize("kind", ["lora", "vera", "task", "soft"])
def test_names_of_every_tuner(kind):
    base, _ = load_model("tiny-random")
    both = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    config = {
        "lora": LoraConfig(**both),
        "vera": VeraConfig(r=2, target_modules=["q_proj"]),
        "task": ALoRAConfig(tasks=TASKS, task_type="CAUSAL_LM", **both),
        "soft": ALoRAConfig(num_experts=2, routing="soft", task_type="CAUSAL_LM", **both),
    }[kind]
    model = get_peft_model(base, config, adapter_name="mine")
    batches = {t: {"input_ids": torch.randint(3, 90, (2, 5)), "ids": torch.tensor([i, i])} for i, t in enumerate(TASKS)}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with route(batch["ids"]):
            return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    records = task_conflicts(model, batches, loss)
    targets, parts = (["q_proj"], ["lambda_b", "lambda_d"]) if kind == "vera" else (["q_proj", "v_proj"], ["A", "B"])
    modules = [f"base_model.model.model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in targets]
    assert [(r.module, r.parameter) for r in records] == [(m, p) for m in modules for p in parts]
    per_task = {r.parameter for r in records if not r.shared}
    assert per_task == ({"A"} if kind == "task" else set())
    live = "lambda_b" if kind == "vera" else "B"  # B is zero at the start: everything else has no gradient yet
    assert {r.pairs for r in records if r.parameter == live} == {3}
    if kind != "vera":
        assert {r.pairs for r in records if r.parameter == "A"} == {0}


def test_two_trainable_adapters_are_not_mixed_up():
    base, _ = load_model("tiny-random")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    batches = {t: {"input_ids": torch.randint(3, 90, (2, 5))} for t in TASKS}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch, labels=batch["input_ids"]).loss

    refused("q_proj has several trainable adapters", task_conflicts, model, batches, loss)
    names = [n for n, _ in model.named_parameters() if ".second." in n]
    assert len(task_conflicts(model, batches, loss, names)) == 4


def test_no_module_hides_a_public_name():
    for file in Path(analysis.__file__).parent.glob("[a-z]*.py"):
        importlib.import_module(f"alora_kernels.analysis.{file.stem}")
    assert not [name for name in analysis.__all__ if inspect.ismodule(getattr(analysis, name))]


@pytest.mark.parametrize("experts_a", ["shared", "each"])
@pytest.mark.parametrize("experts_b", ["shared", "each"])
def test_tasks_of_adapted_experts_share_b_alone(experts_a, experts_b):
    model = mixtures.adapted(experts_A=experts_a, experts_B=experts_b)
    batches = {task: {"input_ids": ids[None], "adapter_names": [task]} for task, ids in zip(
        mixtures.TASKS, mixtures.tokens(3), strict=True)}  # fmt: skip
    found = task_conflicts(model, batches, lambda model, batch: model(**batch, labels=batch["input_ids"]).loss)
    assert len(found) == 8 and all(min(each.norms) > 0 for each in found)
    assert {(each.parameter, each.sharing, each.pairs) for each in found} == {("A", "per task", 0), ("B", "shared", 3)}
