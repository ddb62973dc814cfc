"""`PerTaskLinear` against its formula written out in float64, in every row layout, and as a layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import alora_kernels
from alora_kernels import Routing, route
from alora_kernels.baselines.layers import PerTaskLinear
from alora_kernels.ops.torch.rows import Slots, Whole, layout_of
from tests.modules.steps import assert_as_good, step


def layer(tasks: int = 3, *, k: int = 10, n: int = 8, r: int = 4, bias: bool = True, **options: float) -> PerTaskLinear:
    """A layer whose B are not zero."""
    new = PerTaskLinear(nn.Linear(k, n, bias=bias), r, tasks=tasks, **options)
    with torch.no_grad():
        new.lora_B.normal_()
    return new


def written_out(ids: Tensor):
    """`y_m = x_m W0^T + bias + s B_t A_t x_m`, row by row."""

    def formula(layer: PerTaskLinear, x: Tensor) -> Tensor:
        rows, y = x.flatten(0, -2), F.linear(x, layer.weight, layer.bias).flatten(0, -2)
        per_row = ids.repeat_interleave(rows.shape[0] // ids.numel()).tolist()
        low = [
            layer.scaling * layer.lora_B[t] @ (layer.lora_A[t] @ row) if t >= 0 else torch.zeros_like(y[0])
            for t, row in zip(per_row, rows, strict=True)
        ]
        return (y + torch.stack(low)).view(*x.shape[:-1], -1)

    return formula


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
    one, x, ids = layer(5, lora_alpha=6.0), torch.randn(*leading, 10), torch.tensor(ids)
    chosen = layout_of(Routing(ids).groups(x.shape[:-1], 5, x.device))
    kind = {"w": Whole, "s": Slots}.get(name[0], list)
    assert isinstance(chosen, kind)
    with route(ids):
        assert_as_good(one, written_out(ids), x, dtype)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=70), st.booleans())
def test_any_batch(ids, ordered):
    ids = torch.tensor(sorted(ids) if ordered else ids)
    torch.manual_seed(0)
    one, x = layer(4, k=5, n=6, r=2).double(), torch.randn(ids.numel(), 5, dtype=torch.float64)
    with route(ids):
        ours = step(one, lambda module, x: module(x), x)
    for key, value in step(one, _connected(written_out(ids)), x).items():
        torch.testing.assert_close(ours[key], value, msg=key)


def _connected(formula):
    """A batch of base rows alone has zero gradients, not none."""
    return lambda layer, x: formula(layer, x) + 0.0 * (layer.lora_A.sum() + layer.lora_B.sum())


def test_gradcheck():
    one, ids = layer(3, k=5, n=4, r=2).double(), torch.tensor([2, 0, -1, 2])
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    a, b = (t.detach().clone().requires_grad_() for t in (one.lora_A, one.lora_B))

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        with route(ids):
            return torch.func.functional_call(one, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, a, b))


@pytest.mark.parametrize(("leading", "ids"), [((0,), []), ((2, 0), [0, 1]), ((0, 3), []), ((3,), [-1, -1, -1])])
def test_no_rows_of_any_task(leading, ids):
    one, x = layer(), torch.randn(*leading, 10)
    with route(torch.tensor(ids, dtype=torch.long)):
        y = one(x)
    assert torch.equal(y, F.linear(x, one.weight, one.bias))
    y.sum().backward()
    assert not one.lora_A.grad.any() and not one.lora_B.grad.any()


def test_rows_of_other_tasks_and_of_none_are_untouched():
    one, x, ids = layer(), torch.randn(40, 10), torch.tensor([0, -1, 2, 0] * 10)
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


def test_it_starts_as_its_base_which_it_shares():
    linear = nn.Linear(10, 8)
    one = PerTaskLinear(linear, 4, tasks=["math", "code"])
    x = torch.randn(3, 10)
    with route(torch.tensor([1, 0, -1])):
        assert torch.equal(one(x), linear(x))
    assert one.weight is linear.weight and one.bias is linear.bias
    assert [n for n, p in one.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert not torch.equal(one.lora_A[0], one.lora_A[1])
    assert float(one.lora_A.detach().abs().max()) <= 10**-0.5


def test_the_batch_must_say_its_tasks_unless_there_is_one():
    x = torch.randn(3, 10)
    with pytest.raises(ValueError, match="has the tasks 0, 1, 2: call the model inside"):
        layer()(x)
    with route(torch.tensor([0, 3, 1])), pytest.raises(ValueError, match="task id 3 is out of range"):
        layer()(x)
    only = layer(1)
    with route(torch.zeros(3, dtype=torch.long)):
        want = only(x)
    assert torch.equal(only(x), want)


def test_dropout_has_one_mask_and_stops_in_evaluation():
    one, x, ids = layer(lora_dropout=0.5), torch.randn(60, 10), torch.tensor([0, 1, 2] * 20)
    with route(ids):
        torch.manual_seed(3)
        first = one(x)
        torch.manual_seed(3)
        dropped = F.dropout(x, 0.5)
        base = F.linear(x, one.weight, one.bias)
        want = base + written_out(ids)(one, dropped) - F.linear(dropped, one.weight, one.bias)
        torch.testing.assert_close(first, want)
        torch.testing.assert_close(one.eval()(x), written_out(ids)(one, x))


def test_recomputation_keeps_the_routing_or_is_refused():
    one, x, ids = layer(), torch.randn(4, 10, requires_grad=True), torch.tensor([0, 1, 2, -1])
    with route(ids):
        (want,) = torch.autograd.grad(one(x).square().sum(), x)
        kept = checkpoint(alora_kernels.keep_routing(one), x, use_reentrant=False)
        lost = checkpoint(one, x, use_reentrant=False)
    with route(torch.tensor([2, 2, 0, 0])):
        assert torch.equal(torch.autograd.grad(kept.square().sum(), x)[0], want)
        with pytest.raises(RuntimeError, match=r"alora_kernels\.keep_routing\(block\)"):
            torch.autograd.grad(lost.square().sum(), x)


def test_autocast():
    one, x, ids = layer(), torch.randn(40, 10), torch.tensor([0, 1, 2, -1] * 10)
    for order in (ids, ids.sort().values, torch.zeros_like(ids)):
        with route(order), torch.autocast("cpu", dtype=torch.bfloat16):
            y = one(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), written_out(order)(one, x), atol=0.2, rtol=0.05)


def test_bad_arguments_and_repr():
    linear = nn.Linear(10, 8)
    for tasks in (["a", "a"], [], ["__base__"]):
        with pytest.raises(ValueError, match="task"):
            PerTaskLinear(linear, 4, tasks=tasks)
    with pytest.raises(TypeError, match=r"use \['math'\]"):
        PerTaskLinear(linear, 4, tasks="math")
    with pytest.raises(TypeError, match=r"PerTaskLinear replaces an nn.Linear, got Sequential"):
        PerTaskLinear(nn.Sequential(linear), 4, tasks=2)
    assert "r=4, lora_alpha=8, bias=True, tasks=['a', 'b']" in repr(PerTaskLinear(linear, 4, tasks=["a", "b"]))
