"""The compared layers against their formula written out in float64, in every row layout, and as modules."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import alora_kernels
from alora_kernels import Routing, route
from alora_kernels.baselines.layers import HydraLinear, PerTaskLinear
from alora_kernels.modules.adapter import AdaptedLinear
from alora_kernels.ops.torch_rows import Slots, Whole, layout_of
from bench.reproduce.shared_a import SharedALinear
from tests.compare import assert_module_as_good, module_step
from tests.support.refusals import refused

KINDS = {
    "hydra": (HydraLinear, "num_experts"),
    "per task": (PerTaskLinear, "tasks"),
    "shared A": (SharedALinear, "tasks"),
}
ADAPTERS = ["lora_A", "lora_B", "router"]


def layer(kind: str, experts: int = 3, *, k: int = 10, n: int = 8, r: int = 4, bias: bool = True, **options):
    """A layer whose B are not zero."""
    cls, name = KINDS[kind]
    new = cls(nn.Linear(k, n, bias=bias), r, **{name: experts}, **options)
    with torch.no_grad():
        new.lora_B.normal_()
    return new


def adapters(one: AdaptedLinear) -> dict[str, Tensor]:
    return {name: p for name, p in one.named_parameters() if p.requires_grad}


def routed(kind: str, ids):
    """What the rows of a batch need around the call."""
    return nullcontext() if kind == "hydra" else route(torch.as_tensor(ids))


def written_out(ids=None):
    """`y_m = x_m W0^T + bias + s sum_e g_me B_e A_e x_m`, one output of full width per expert or task."""

    def formula(layer: AdaptedLinear, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = F.linear(rows, layer.weight, layer.bias)
        if isinstance(layer, HydraLinear):
            gate = torch.softmax(rows @ layer.router.t(), -1)
        else:
            per_row = torch.as_tensor(ids).repeat_interleave(rows.shape[0] // len(ids))
            gate = (per_row[:, None] == torch.arange(len(layer.tasks))).to(x.dtype)
        for e, b in enumerate(layer.lora_B):
            a = layer.lora_A if layer.lora_A.dim() == 2 else layer.lora_A[e]
            y = y + layer.scaling * gate[:, e, None] * (rows @ a.t() @ b.t())
        return y.view(*x.shape[:-1], -1)

    return formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("leading", "experts", "bias"), [((3, 6), 3, True), ((7,), 1, False), ((1, 1), 5, True)])
def test_hydra_values_and_gradients(leading, experts, bias, dtype):
    one = layer("hydra", experts, bias=bias, lora_alpha=6.0)
    assert_module_as_good(one, written_out(), torch.randn(*leading, 10), dtype)


LAYOUTS = {
    "whole": ([1], (1, 6)),
    "whole, several rows": ([2, 2], (2, 3)),
    "slots of equal length": ([0, 1, 2, 1, 2, 0], (6,)),
    "slots with free ones, base rows": ([0, -1, 1, 0, 2, 0, -1], (7,)),
    "slots of some tasks": ([4, 1, 4, 1], (4, 2)),
    "long runs": ([0, 2, 1, 0], (4, 40)),
    "long runs, base rows, some tasks": ([3, -1, 1], (3, 40)),
    "uneven, one by one": ([0] * 60 + [1, 0, 2], (63,)),
    "uneven, one by one, base rows": ([-1, 3] * 45 + [1, 0, -1], (93,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients_in_every_layout(name, dtype):
    ids, leading = LAYOUTS[name]
    x = torch.randn(*leading, 10)
    chosen = layout_of(Routing(torch.tensor(ids)).groups(x.shape[:-1], 5, x.device))
    assert isinstance(chosen, {"w": Whole, "s": Slots}.get(name[0], list))
    with route(torch.tensor(ids)):
        assert_module_as_good(layer("per task", 5, lora_alpha=6.0), written_out(ids), x, dtype)


def test_shared_a_is_the_formula_row_by_row_with_its_gradients():
    ids = [1, 0, -1, 1]
    with route(torch.tensor(ids)):
        one, x = layer("shared A", 2, lora_alpha=6), torch.randn(4, 2, 10, dtype=torch.float64)
        assert_module_as_good(one, written_out(ids), x, torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=70), st.booleans())
def test_any_batch(ids, ordered):
    ids = sorted(ids) if ordered else ids
    torch.manual_seed(0)
    one, x = layer("per task", 4, k=5, n=6, r=2).double(), torch.randn(len(ids), 5, dtype=torch.float64)
    with route(torch.tensor(ids)):
        ours = module_step(one, lambda module, x: module(x), x)
    for key, value in module_step(one, written_out(ids), x).items():
        torch.testing.assert_close(ours[key], value, msg=key)


@pytest.mark.parametrize("kind", ["hydra", "per task"])
def test_gradcheck(kind):
    one = layer(kind, k=5, n=4, r=2).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    values = {name: p.detach().clone().requires_grad_() for name, p in adapters(one).items()}

    def run(x: Tensor, *new: Tensor) -> Tensor:
        with routed(kind, [2, 0, -1, 2]):
            return torch.func.functional_call(one, dict(zip(values, new, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values.values()))


@pytest.mark.parametrize(
    ("kind", "leading", "ids"),
    [
        ("hydra", (0,), None), ("hydra", (2, 0), None), ("hydra", (0, 3), None), ("per task", (0,), []),
        ("per task", (2, 0), [0, 1]), ("per task", (0, 3), []), ("per task", (3,), [-1, -1, -1]),
    ],
)  # fmt: skip
def test_no_rows_of_any_task(kind, leading, ids):
    one, x = layer(kind), torch.randn(*leading, 10)
    with routed(kind, torch.tensor(ids or [], dtype=torch.long)):
        y = one(x)
    assert y.shape == (*leading, 8) and torch.equal(y, F.linear(x, one.weight, one.bias))
    y.sum().backward()
    assert all(not p.grad.any() for p in adapters(one).values())


def test_rows_of_other_tasks_and_of_none_are_untouched():
    one, x, ids = layer("per task"), torch.randn(40, 10), torch.tensor([0, -1, 2, 0] * 10)
    with route(ids):
        y = one(x)
        assert torch.equal(y[ids < 0], F.linear(x, one.weight, one.bias)[ids < 0])
        with torch.no_grad():
            one.lora_A[2], one.lora_B[2] = torch.nan, torch.nan
        again = one(x)
    assert torch.equal(again[ids != 2], y[ids != 2])
    again[ids != 2].sum().backward()
    assert torch.isfinite(one.lora_A.grad[:2]).all() and torch.isfinite(one.lora_B.grad[:2]).all()
    assert not one.lora_A.grad[1].any()


def test_one_expert_is_lora():
    one, x = layer("hydra", 1), torch.randn(4, 10)
    want = F.linear(x, one.weight + one.scaling * one.lora_B[0] @ one.lora_A, one.bias)
    torch.testing.assert_close(one(x), want)


@pytest.mark.parametrize("kind", ["hydra", "per task"])
def test_it_starts_as_its_base_which_it_shares(kind):
    linear, x = nn.Linear(10, 8), torch.randn(3, 5, 10)
    cls, name = KINDS[kind]
    one = cls(linear, 4, **{name: 3})
    with routed(kind, [1, 0, -1]):
        assert torch.equal(one(x), linear(x))
    assert one.weight is linear.weight and one.bias is linear.bias
    names = ADAPTERS if kind == "hydra" else ADAPTERS[:2]
    assert list(adapters(one)) == names and set(one.state_dict()) == {"weight", "bias", *names}
    assert float(one.lora_A.detach().abs().max()) <= 10**-0.5  # kaiming uniform, a = sqrt 5: bound 1 / sqrt(K)
    drawn = one.router if kind == "hydra" else one.lora_A
    assert not torch.equal(drawn[0], drawn[1])


def test_the_b_part_at_the_first_step_because_their_gates_differ():
    one = HydraLinear(nn.Linear(10, 8), 4, num_experts=2)
    one(torch.randn(6, 10)).square().sum().backward()
    assert not torch.allclose(one.lora_B.grad[0], one.lora_B.grad[1])


def test_the_routing_context_is_harmless_to_a_layer_without_tasks():
    one, x = layer("hydra"), torch.randn(3, 10)
    want = one(x)
    with route(torch.tensor([5, -1, 0])):
        assert torch.equal(one(x), want)


@pytest.mark.parametrize("kind", ["per task", "shared A"])
def test_the_batch_must_say_its_tasks_unless_there_is_one(kind):
    x = torch.randn(3, 10)
    refused("has the tasks 0, 1, 2: call the model inside `with alora_kernels.route", layer(kind), x)
    with route(torch.tensor([0, 3, 1])), pytest.raises(ValueError, match="task id 3 is out of range"):
        layer(kind)(x)
    only = layer(kind, 1)
    with route(torch.zeros(3, dtype=torch.long)):
        want = only(x)
    assert torch.equal(only(x), want)


@pytest.mark.parametrize("kind", ["hydra", "per task"])
def test_dropout_is_seeded_spares_base_and_router_and_stops_in_evaluation(kind):
    one, x, ids = layer(kind, lora_dropout=0.5), torch.randn(60, 10), [0, 1, 2] * 20
    with routed(kind, ids):
        torch.manual_seed(3)
        first = one(x)
        torch.manual_seed(3)
        assert torch.equal(one(x), first)
        evaluated = one.eval()(x)
    torch.testing.assert_close(evaluated, written_out(ids)(one, x))
    torch.manual_seed(3)
    dropped, base = F.dropout(x, 0.5), F.linear(x, one.weight, one.bias)
    if kind == "hydra":
        gate = torch.softmax(x @ one.router.t(), -1)
        low = one.scaling * torch.einsum("me,mr,enr->mn", gate, dropped @ one.lora_A.t(), one.lora_B)
    else:
        low = written_out(ids)(one, dropped) - F.linear(dropped, one.weight, one.bias)
    torch.testing.assert_close(first, base + low)


def test_recomputation_keeps_the_routing_or_is_refused():
    one, x, ids = layer("per task"), torch.randn(4, 10, requires_grad=True), torch.tensor([0, 1, 2, -1])
    with route(ids):
        (want,) = torch.autograd.grad(one(x).square().sum(), x)
        kept = checkpoint(alora_kernels.keep_routing(one), x, use_reentrant=False)
        lost = checkpoint(one, x, use_reentrant=False)
    with route(torch.tensor([2, 2, 0, 0])):
        assert torch.equal(torch.autograd.grad(kept.square().sum(), x)[0], want)
        with pytest.raises(RuntimeError, match=r"alora_kernels\.keep_routing\(block\)"):
            torch.autograd.grad(lost.square().sum(), x)


@pytest.mark.parametrize(("kind", "atol"), [("hydra", 0.1), ("per task", 0.2)])
def test_autocast(kind, atol):
    one, x, ids = layer(kind), torch.randn(40, 10), torch.tensor([0, 1, 2, -1] * 10)
    for order in (ids, ids.sort().values, torch.zeros_like(ids)):
        with routed(kind, order), torch.autocast("cpu", dtype=torch.bfloat16):
            y = one(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), written_out(order)(one, x), atol=atol, rtol=0.05)


def test_wide_adapters_on_a_narrow_base():
    narrow = HydraLinear(nn.Linear(10, 8).bfloat16(), 4, num_experts=2)
    for parameter in adapters(narrow).values():
        parameter.data = parameter.data.float()
    narrow(torch.randn(4, 10).bfloat16()).sum().backward()
    assert narrow.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("cls", "linear", "options", "error", "message"),
    [
        (HydraLinear, nn.Linear, {"r": 0}, ValueError, "r must be a whole number >= 1"),
        (HydraLinear, nn.Linear, {"num_experts": 0}, ValueError, "num_experts must be"),
        (HydraLinear, nn.Linear, {"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\)"),
        (HydraLinear, nn.Bilinear, {}, TypeError, "HydraLinear replaces an nn.Linear, got Bilinear"),
        (PerTaskLinear, nn.Linear, {"tasks": ["a", "a"]}, ValueError, "task"),
        (PerTaskLinear, nn.Linear, {"tasks": []}, ValueError, "task"),
        (PerTaskLinear, nn.Linear, {"tasks": ["__base__"]}, ValueError, "task"),
        (PerTaskLinear, nn.Linear, {"tasks": "math"}, TypeError, r"use \['math'\]"),
        (PerTaskLinear, nn.Bilinear, {}, TypeError, "PerTaskLinear replaces an nn.Linear, got Bilinear"),
    ],
)
def test_bad_arguments(cls, linear, options, error, message):
    base = linear(3, 3) if linear is nn.Linear else linear(3, 3, 3)
    refused(message, cls, base, error=error, **{"r": 4, "num_experts" if cls is HydraLinear else "tasks": 2, **options})


def test_repr():
    text = repr(HydraLinear(nn.Linear(10, 8), 4, num_experts=2, use_rslora=True, lora_dropout=0.1))
    assert "r=4, lora_alpha=8, bias=True, lora_dropout=0.1, use_rslora=True, num_experts=2" in text
    assert "r=4, lora_alpha=8, bias=True, tasks=['a', 'b']" in repr(
        PerTaskLinear(nn.Linear(10, 8), 4, tasks=["a", "b"])
    )
