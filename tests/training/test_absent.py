"""`KeepAbsentTasks` with optimisers of every kind of state: entries, factors, 8-bit blocks, copies of the parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from alora_kernels.training import KeepAbsentTasks
from alora_kernels.training.absent import by_task, tensors_of

SHAPE = (4, 8, 256)
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def of(library: str, name: str, **options: Any) -> Make:
    """An optimiser with quantised state, whose library may not be installed."""
    return lambda parameters: getattr(pytest.importorskip(library), name)(parameters, lr=0.01, **options)


BNB, AO = "bitsandbytes.optim", "torchao.optim"


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD in a few lines: its state is a copy of the parameter, and it writes into the gradient."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.clone())
            p.grad.add_(p, alpha=0.1)
            p.lerp_(z, 0.5).sub_(p.grad, alpha=0.01)
            z.sub_(p.grad, alpha=0.1)


OPTIMISERS: dict[str, Make] = {
    "schedule-free": ScheduleFree,
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor-torch": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "adafactor": lambda p: Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9),
    "lion": of(BNB, "Lion", betas=(0.9, 0.99)),
    "adamw-8bit": of(BNB, "AdamW8bit"),
    "lion-8bit": of(BNB, "Lion8bit"),
    "sgd-8bit": of(BNB, "SGD8bit", momentum=0.9),
    "ademamix-8bit": of(BNB, "AdEMAMix8bit"),
    "torchao-8bit": of(AO, "AdamW8bit", weight_decay=0.1),
    "torchao-4bit": of(AO, "AdamW4bit", weight_decay=0.1),
    "torchao-fp8": of(AO, "AdamWFp8", weight_decay=0.1),
}


def step(optimizer: torch.optim.Optimizer, p: nn.Parameter, grad: torch.Tensor) -> None:
    p.grad = grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_values_and_state_of_an_absent_task_stay(name):
    """Task 1 is absent in the third step; the others move exactly as without the hooks, where task 1 moves too."""
    torch.manual_seed(0)
    start, grads = torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(4)]
    grads[2][1] = 0
    kept, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, theirs = OPTIMISERS[name]([kept]), OPTIMISERS[name]([plain])
    KeepAbsentTasks(ours, [kept])
    for grad in grads[:3]:
        before = kept.detach().clone()
        old = {k: v.clone() for k, v in dict(tensors_of(ours, kept)).items()}
        step(ours, kept, grad)
        step(theirs, plain, grad)
    assert torch.equal(kept[1], before[1])
    state = dict(tensors_of(ours, kept))
    coded = any(value.dtype.itemsize == 1 for value in state.values())
    for key, value in state.items():
        now, then = (by_task(v, kept, coded=coded) for v in (value, old[key]))
        if now is None:  # a table of codes
            assert torch.equal(value, old[key])
        else:
            assert torch.equal(now[1], then[1]), key
            if "qmap" not in key:
                assert not torch.equal(now[0], then[0]), key
    assert not torch.equal(kept[0], before[0])
    others = [0, 2, 3]
    if name not in ("rprop", "adafactor-torch"):  # which do not move without a gradient
        assert not torch.equal(plain[1], before[1])
    for _ in range(2):  # after the third step and after the fourth
        if "adafactor" not in name:  # whose update is clipped by the mean over all tasks
            assert torch.equal(kept[others], plain[others])
        step(ours, kept, grads[3])
        step(theirs, plain, grads[3])


def test_a_task_that_never_came_starts_as_a_fresh_one():
    """Moments begin at zero; state that is none, such as a step size, does not, or the task could never move."""
    for kind in (torch.optim.AdamW, torch.optim.Rprop):
        p = nn.Parameter(torch.ones(2, 1, 3))
        optimizer = kind([p], lr=0.01)
        KeepAbsentTasks(optimizer, [p])
        grad = torch.zeros_like(p)
        grad[0] = 1
        step(optimizer, p, grad)
        assert torch.equal(p[1], torch.ones(1, 3))
        if kind is torch.optim.AdamW:
            assert (optimizer.state[p]["exp_avg"][1] == 0).all() and (optimizer.state[p]["exp_avg"][0] != 0).all()
    step(optimizer, p, torch.ones_like(p))
    torch.testing.assert_close(p[1], torch.full((1, 3), 0.99))


@pytest.mark.parametrize("name", ["adamw-8bit", "ademamix-8bit"])
def test_blocks_across_tasks_are_named_once(name):
    p = nn.Parameter(torch.randn(5, 4, 208))  # 832 numbers of a task are three and a quarter blocks
    wider = nn.Parameter(torch.randn(5, 4, 240))
    optimizer = OPTIMISERS[name]([p, wider])
    KeepAbsentTasks(optimizer, [p, wider])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            before = p.detach().clone()
            p.grad, wider.grad = torch.randn_like(p), torch.randn_like(wider)
            p.grad[1] = wider.grad[1] = 0
            optimizer.step()
    told = [str(w.message) for w in caught if "for several tasks together" in str(w.message)]
    assert len(told) == 1
    assert "absmax1" in told[0] and "qmap" not in told[0] and "keep_absent_tasks=False" in told[0]
    assert torch.equal(p[1], before[1])
    assert not torch.equal(p[0], before[0])


def test_an_optimiser_that_steps_something_else_is_named():
    p, other = nn.Parameter(torch.ones(2, 1, 3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([other], lr=0.1)
    KeepAbsentTasks(optimizer, [p])
    other.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="SGD steps other tensors than the model's A"):
        optimizer.step()

    class Hookless:
        pass

    with pytest.raises(TypeError, match="Hookless runs no hooks around its step"):
        KeepAbsentTasks(Hookless(), [p])  # type: ignore[arg-type]


def test_a_skipped_step_of_mixed_precision_changes_nothing():
    """A scaler that finds an overflow does not step: nothing is restored then, and the next step is right."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(2, 2, 3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    KeepAbsentTasks(optimizer, [p])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    for overflow in (False, True, False):
        before = p.detach().clone()
        p.grad = torch.randn_like(p) * 2
        p.grad[1] = 0
        if overflow:
            p.grad[0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p[1], before[1])
        assert torch.equal(p[0], before[0]) == overflow
    wrapped = Accelerator(cpu=True).prepare(torch.optim.SGD([p], lr=0.1))
    keeper = KeepAbsentTasks(wrapped, [p])
    assert keeper.optimizer is wrapped.optimizer
