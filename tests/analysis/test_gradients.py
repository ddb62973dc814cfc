"""Gradients of tiny models by task, and what measuring them must leave alone."""

from __future__ import annotations

import importlib
import inspect
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from alora_kernels import FusedALoRALinear, analysis, route
from alora_kernels.analysis import (
    NotFiniteError,
    task_conflicts,
    task_gradients,
)
from alora_kernels.data import load_model
from alora_kernels.tuner import ALoRAConfig

from .draws import randn

TASKS = ["copy", "next", "zero"]


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
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return (
        grads, [m.training for m in model.modules()], torch.get_rng_state(), random.getstate(),
        [np.random.get_state()[1].copy(), np.random.get_state()[2]],
    )  # fmt: skip


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    for name, grad in before[0].items():
        assert (grad is None) == (after[0][name] is None)
        assert grad is None or torch.equal(grad, after[0][name])
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2]) and before[3] == after[3] and before[4][1] == after[4][1]
    assert np.array_equal(before[4][0], after[4][0])


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
    with torch.no_grad():  # a caller may be inside one
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                task_gradients(model, toy_batches(), loss)
        else:
            task_gradients(model, toy_batches(), loss)
    assert_same(before, state_of(model))
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
    with pytest.raises(ValueError, match="batches is empty"):
        task_gradients(model, {}, towards)
    with pytest.raises(ValueError, match=r"trainable parameters of the model, got \['lora_C'\]"):
        task_gradients(model, batches, towards, ["lora_A", "lora_C"])
    with pytest.raises(ValueError, match=r"for task 'up' it returned shape \[5, 4\]"):
        task_gradients(model, batches, lambda m, b: m(b["x"]))
    with pytest.raises(ValueError, match="it returned float"):
        task_gradients(model, batches, lambda m, b: 1.0)
    with pytest.raises(ValueError, match="no trainable asymlora_A/B"):
        task_gradients(nn.Linear(2, 2), batches, towards)
    with pytest.raises(ValueError, match="at least two, got up"):
        task_conflicts(model, {"up": batches["up"]}, lambda m, b: pytest.fail("computed in vain"))
    model.lora_A.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got \['lora_A'\]"):
        task_gradients(model, batches, towards, ["lora_A"])
    batches["down"]["target"] = batches["down"]["target"] * float("nan")
    before = state_of(model)
    with pytest.raises(NotFiniteError, match=r"infinity: lora_B \(down\)$"):
        task_gradients(model, batches, towards)
    assert_same(before, state_of(model))


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
    config = {
        "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        "vera": lambda: VeraConfig(r=2, target_modules=["q_proj"]),
        "task": lambda: ALoRAConfig(r=2, tasks=TASKS, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "soft": lambda: ALoRAConfig(
            r=2, num_experts=2, routing="soft", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    }[kind]()
    model = get_peft_model(base, config, adapter_name="mine")
    batches = {t: {"input_ids": torch.randint(3, 90, (2, 5)), "ids": torch.tensor([i, i])} for i, t in enumerate(TASKS)}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with route(batch["ids"]):
            return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    records = task_conflicts(model, batches, loss)
    prefix = "base_model.model.model.layers"
    if kind == "vera":
        places = [(f"{prefix}.{i}.self_attn.q_proj", p) for i in (0, 1) for p in ("lambda_b", "lambda_d")]
    else:
        modules = [f"{prefix}.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")]
        places = [(m, p) for m in modules for p in "AB"]
    assert [(r.module, r.parameter) for r in records] == places
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

    with pytest.raises(ValueError, match="q_proj has several trainable adapters"):
        task_conflicts(model, batches, loss)
    names = [n for n, _ in model.named_parameters() if ".second." in n]
    assert len(task_conflicts(model, batches, loss, names)) == 4


def test_no_module_hides_a_public_name():
    for file in Path(analysis.__file__).parent.glob("[a-z]*.py"):
        importlib.import_module(f"alora_kernels.analysis.{file.stem}")
    assert not [name for name in analysis.__all__ if inspect.ismodule(getattr(analysis, name))]
