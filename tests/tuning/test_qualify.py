"""What a plan must do before it is chosen: real kernels in the interpreter, at tiny sizes; and kernels made wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alora_kernels import kernels as ak
from alora_kernels.kernels.tiles import override_tiles
from alora_kernels.kernels.tuned import OK, Table
from alora_kernels.ops.dispatch import PLANS
from alora_kernels.tuning import layer, run
from tests.compare import skip_unless_runnable

from . import fakes

TINY = ((70, 32, 32, 3, 4), (33, 32, 32, 2, 4, 0.25, True), (5, 33, 35, 2, 4))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_runnable("triton", "cpu", torch.float16)
    monkeypatch.setattr(run, "CHECKS", TINY)
    monkeypatch.setattr(run, "RACES", dict.fromkeys(run.ROUTINGS, TINY[:1]))


def proven(routing: str, plan: str) -> str:
    one = fakes.tuner()
    one._qualify("name", routing, plan)
    return one.table.verdicts["name"]


def small(routing: str = "task", which: int = 0) -> layer.Layer:
    return layer.Layer(routing, *TINY[which], dtype=torch.float16, device="cpu")


@pytest.mark.parametrize("routing", run.ROUTINGS)
@pytest.mark.parametrize("plan", [name for name in PLANS if "+overlap" not in name])
def test_our_kernels_pass(routing: str, plan: str) -> None:
    assert proven(routing, plan) == OK


Outputs = tuple[Tensor, ...]


def spoiled(monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[Outputs], Any]) -> None:
    """Make a launcher of the kernels wrong."""
    right = getattr(ak, kernel)
    monkeypatch.setattr(ak, kernel, lambda *args, **options: change(right(*args, **options)))


def unwritten(outputs: Outputs) -> Outputs:
    outputs[0][-1] = torch.empty_like(outputs[0][-1])
    return outputs


def off(outputs: Outputs) -> Outputs:
    outputs[0][3] += 0.25
    return outputs


def changing(outputs: Outputs) -> Outputs:
    outputs[0][0, 0] += 2e-3 * torch.rand(())
    return outputs


@pytest.mark.parametrize("routing", run.ROUTINGS)
@pytest.mark.parametrize("plan", ["one_pass", "two_launch+pdl", "two_launch"])
def test_plans_that_may_race_are_repeated_most(plan: str, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(layer.Layer, "wrong", lambda *_: "")
    monkeypatch.setattr(layer.Layer, "raced", lambda _, plan, repeats: seen.append(repeats) or "")
    assert proven(routing, plan) == OK
    assert seen == [1 if plan == "two_launch" else fakes.tuner().repeats]


@pytest.mark.parametrize("change", [unwritten, off, changing])
@pytest.mark.parametrize("kernel", ["one_pass_task", "one_pass_soft"])
def test_a_wrong_kernel_is_named_and_never_chosen(
    monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[Outputs], Any]
) -> None:
    spoiled(monkeypatch, kernel, change)
    routing = kernel.removeprefix("one_pass_")
    other = "soft" if routing == "task" else "task"
    table = Table(dict(fakes.KEY), verdicts={f"{other}/{plan}": OK for plan in PLANS})
    table.verdicts |= {f"{routing}/{plan}": OK for plan in PLANS if not plan.startswith("one_pass")}
    tuner = fakes.tuner(table, fakes.device(lambda name: 0.1 if str(name).startswith("one_pass") else 1.0))
    timed = [shape.m for shape in fakes.SHAPES]  # these are not computed
    made = lambda *args, **options: (fakes.FakeLayer if args[1] in timed else layer.Layer)(*args, **options)  # noqa: E731
    monkeypatch.setattr(run, "Layer", made)
    monkeypatch.setattr(run, "KERNELS", ())
    assert tuner.run() == 0
    said = table.verdicts[f"{routing}/one_pass"]
    assert said.startswith("y ") and "70x32x32" in said, said
    assert table.plans[f"{routing}/2/long square"]["plan"][0] != "one_pass"
    assert table.plans[f"{other}/2/long square"]["plan"][0] == "one_pass"


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, "dx_task", lambda dx: dx * 1.1)
    assert small().wrong("two_launch").startswith("dx is off by ")
    assert small("soft").wrong("two_launch") == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [(unwritten, "left entries unwritten"), (off, "was wrong"), (changing, "differed from one run")],
)
def test_a_race_that_shows_once_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Outputs], Any], words: str
) -> None:
    calls = []
    spoiled(
        monkeypatch, "one_pass_task", lambda outputs: change(outputs) if calls.append(0) or len(calls) == 5 else outputs
    )
    said = small().raced("one_pass", 4)
    assert said.startswith(words) and "within 4 runs" in said


def test_a_fault_of_dropout_that_all_plans_share_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert small(which=1).raced("two_launch", 2) == ""
    spoiled(monkeypatch, "shrink_task", lambda h: h.add_(0.5))
    assert small(which=1).raced("two_launch", 2).startswith("was wrong")


def test_repetitions_see_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = small(), []

    def look(outputs: Outputs) -> Outputs:
        tensors = one.x, one.adapter.a, one.b, one.adapter.task_groups.ids
        seen.append([float(t.double().sum()) for t in tensors])
        return outputs

    spoiled(monkeypatch, "one_pass_task", look)
    assert one.raced("one_pass", 3) == ""
    assert seen[::2] == seen[1::2] and len(seen) == 6  # each twice on the same numbers
    assert all(len(set(numbers)) == 3 for numbers in zip(*seen, strict=True))


def test_memory_is_poisoned_inside_only() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with layer.poisoned():
        assert torch.empty(64).isnan().all() and torch.empty(8, dtype=torch.float16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_plan_without_a_kernel_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CHECKS", ((70, 33, 35, 2, 4),))  # rows that are not aligned
    monkeypatch.setattr(run, "RACES", {"task": ()})
    assert proven("task", "one_pass") == run.UNTAKEN and proven("task", "two_launch") == OK


@pytest.mark.parametrize("kernel", [k for k in run.KERNELS if k != "gemm"])
def test_a_tile_that_is_tried_is_what_runs(kernel: str) -> None:
    """In forward and backward: a tile that nobody looks up would be timed for nothing."""
    looked: list[str] = []

    class Spy(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> Any:
            looked.append(name)
            return super().__getitem__(name)

    routing, plan = "soft" if "soft" in kernel else "task", "one_pass" if kernel in run.WAITING else "two_launch"
    m = 5 if kernel == "decode" else 70
    one = layer.Layer(routing, m, 32, 48, 3, 4, dtype=torch.float16, device="cpu")
    launch, used = one.launcher(kernel), run.tile_for(kernel, one.x.device, one.x.dtype)
    for tile in run.neighbours(used, kernel, 10**6)[1:2]:
        with override_tiles(Spy({kernel: tile})):
            launch()
            assert looked == [kernel]
            assert one.wrong(plan) == ""
            assert len(looked) > 1
        looked.clear()
