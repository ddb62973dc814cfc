"""`alora_linear_group`: the same as one `alora_linear` per member, with one pass over x and one dx."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from alora_kernels import Routing, alora_linear, alora_linear_group, reference
from tests.compare import skip_unless_runnable

from .groups import Group, assert_as_good_as_torch, group

BACKENDS = ["torch", "triton"]
ROUTINGS = ["task", "soft"]
SHAPES = {
    "one member": ((7,), 20, (12,), (4,), (3,)),
    "equal": ((3, 5), 16, (16, 16, 16), (8, 8, 8), (3, 3, 3)),
    "grouped queries": ((2, 3, 4), 24, (24, 8, 8), (4, 4, 4), (4, 4, 4)),
    "ragged": ((33,), 17, (33, 5, 19), (5, 1, 3), (3, 3, 3)),
    "two": ((21,), 12, (40, 40), (16, 16), (2, 2)),
    "more of A than of x": ((3,), 16, (8, 6, 4), (4, 4, 4), (6, 6, 6)),  # not stacked
    "no rows": ((0,), 6, (5, 4), (2, 3), (2, 2)),
    "one expert": ((9,), 8, (7, 6, 5), (2, 2, 2), (1, 1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(device, backend, routing, shape, dtype):
    skip_unless_runnable(backend, device, dtype)
    g = group(*SHAPES[shape], routing=routing, dtype=dtype, device=device)
    assert_as_good_as_torch(g, dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_members_may_have_different_numbers_of_experts(backend):
    skip_unless_runnable(backend, "cpu", torch.float32)
    g = group((11,), 10, (8, 6, 7), (3, 2, 1), (2, 5, 3), routing="soft")
    assert_as_good_as_torch(g, torch.float32, backend=backend)


ORDERS = {
    "all equal": torch.full((20,), 2),
    "all base": torch.full((20,), -1),
    "one absent": torch.arange(20) % 3,
    "runs": torch.tensor([0, 3]).repeat_interleave(40),
    "per row": torch.tensor([1, -1]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_tasks_get_no_gradient(backend, order):
    skip_unless_runnable(backend, "cpu", torch.float32)
    ids = ORDERS[order]
    leading = (2, 6) if order == "per row" else tuple(ids.shape)
    g = group(leading, 12, (8, 6, 4), (2, 3, 4), (4, 4, 4), ids=ids)
    assert_as_good_as_torch(g, torch.float32, backend=backend)
    found = g.step(g.call(backend=backend))
    for i in range(3):
        for task in range(4):
            assert bool((found[f"da{i}"][task] == 0).all()) == (task not in ids.tolist())


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dropout_mask_serves_the_group(backend, routing):
    skip_unless_runnable(backend, "cpu", torch.float64)
    g = group((20,), 16, (9, 7), (3, 2), (3, 3), routing=routing, dtype=torch.float64, biases=(False,) * 3)
    eye = torch.eye(16, dtype=torch.float64)
    torch.manual_seed(7)
    mask = alora_linear(  # read off a layer whose A and B are identities
        torch.ones(20, 16, dtype=torch.float64), torch.zeros_like(eye), eye[None], eye,
        task_ids=torch.zeros(20).long(), dropout_p=0.4, training=True, backend=backend,
    ).detach()  # fmt: skip

    def masked(x, weight, a, b, bias, router, task_ids, scaling):
        gate = reference.gate(x, a.shape[0], router, task_ids)
        h = torch.einsum("me,mer->mr", gate, torch.einsum("mk,erk->mer", x * mask, a))
        return x @ weight.t() + scaling * h @ b.t()

    truth = g.step(g.separate(masked))
    torch.manual_seed(7)
    if routing == "task" and backend == "torch":
        assert (mask == 0).any() and (mask != 0).any()
    ours = g.step(g.call(dropout_p=0.4, training=True, backend=backend))
    for name, t in truth.items():
        torch.testing.assert_close(ours[name], t, msg=name)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_and_repetition_give_the_same_bits(backend, routing):
    skip_unless_runnable(backend, "cpu", torch.float32)
    g = group((24,), 16, (12, 8, 8), (4, 2, 3), (3, 3, 3), routing=routing)

    def step(recompute):
        torch.manual_seed(3)
        options = {"dropout_p": 0.5, "training": True, "backend": backend}
        return g.step(checkpoint(g.call, use_reentrant=False, **options) if recompute else g.call(**options))

    first, second, again = step(False), step(False), step(True)
    for name in first:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, routing):
    skip_unless_runnable(backend, "cpu", torch.float64)
    g = group((5,), 7, (3, 4), (2, 1), (3, 3), routing=routing, dtype=torch.float64)
    names = list(g.leaves)

    def layers(x, *leaves):
        return Group(x, g.weights, dict(zip(names, leaves, strict=True)), g.ids, g.scalings).call(backend=backend)

    assert torch.autograd.gradcheck(layers, (g.x, *g.leaves.values()))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_is_given(backend, routing):
    skip_unless_runnable(backend, "cpu", torch.float32)
    g = group((9,), 8, (7, 6, 5), (2, 2, 2), (3, 3, 3), routing=routing)
    whole = g.step(g.call(backend=backend))
    for name in ("x", "b1", *(("router2",) if routing == "soft" else ())):
        for leaf in (g.x, *g.leaves.values()):
            leaf.requires_grad_(False)
        asked = (g.x if name == "x" else g.leaves[name]).requires_grad_()
        ys = g.call(backend=backend)
        generator = torch.Generator().manual_seed(1)
        dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in ys]
        pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
        (grad,) = torch.autograd.grad([y for y, _ in pairs], asked, [dy for _, dy in pairs])
        torch.testing.assert_close(grad, whole[f"d{name}"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_member_nobody_uses(backend):
    skip_unless_runnable(backend, "cpu", torch.float32)
    g = group((9,), 8, (7, 6, 5), (2, 2, 2), (3, 3, 3))
    grads = torch.autograd.grad(g.call(backend=backend)[1].sum(), [g.x, *g.leaves.values()], allow_unused=True)
    truth = torch.autograd.grad(g.separate(reference.alora_linear)[1].sum(), [g.x, g.leaves["a1"]])
    torch.testing.assert_close(grads[0], truth[0])
    found = dict(zip(["x", *g.leaves], grads, strict=True))
    torch.testing.assert_close(found["a1"], truth[1])
    assert (found["a0"] == 0).all() and (found["b2"] == 0).all()


def test_a_shared_routing_and_one_scaling_for_all():
    g = group((2, 5), 12, (8, 6), (2, 2), (3, 3), ids=torch.tensor([2, 0]), biases=(False,) * 3)
    a, b = ([g.leaves[f"{key}{i}"] for i in range(2)] for key in ("a", "b"))
    ys = alora_linear_group(g.x, g.weights, a, b, task_ids=Routing(g.ids), scalings=3)
    for y, w, a_i, b_i in zip(ys, g.weights, a, b, strict=True):
        torch.testing.assert_close(y, alora_linear(g.x, w, a_i, b_i, task_ids=g.ids, scaling=3.0))


def test_without_gradients_the_values_are_the_same():
    for routing in ROUTINGS:
        g = group((2, 5), 12, (8, 6), (2, 2), (3, 3), routing=routing)
        with torch.no_grad():
            plain = g.call()
        assert all(torch.equal(y, z) for y, z in zip(g.call(), plain, strict=True))


BAD = {
    "no members": (dict(weights=[], lora_As=[], lora_Bs=[]), ValueError, "weights is empty"),
    "too few A": (dict(lora_As=[torch.randn(3, 2, 6)]), ValueError, "lora_As must have one entry per weight, 2, got 1"),
    "too many scalings": (dict(scalings=[1.0] * 3), ValueError, "scalings must have one entry per weight, 2, got 3"),
    "too few biases": (dict(biases=[None]), ValueError, "biases must have one entry per weight, 2, got 1"),
    "another K": (
        dict(weights=[torch.randn(5, 6), torch.randn(4, 9)]), ValueError,
        "member 1 of the group: weight has in_features=9 but x has 6",
    ),
    "another R": (
        dict(lora_Bs=[torch.randn(5, 2), torch.randn(4, 9)]), ValueError,
        "member 1 of the group: lora_B has rank 9 but lora_A has rank 2",
    ),
    "another dtype": (
        dict(weights=[torch.randn(5, 6).half(), torch.randn(4, 6)]), TypeError, "member 0 of the group: weight is",
    ),
    "another E": (
        dict(lora_As=[torch.randn(3, 2, 6), torch.randn(4, 2, 6)]), ValueError, "the same number of tasks, got [3, 4]",
    ),
    "both routings": (dict(routers=[torch.randn(3, 6)] * 2), ValueError, "exactly one of router"),
    "no routing": (dict(task_ids=None), ValueError, "got neither"),
    "wrong ids": (dict(task_ids=torch.tensor([0, 3, 0, 0])), ValueError, "task id 3 is out of range"),
    "wrong dropout": (dict(dropout_p=2.0), ValueError, "between 0 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, error, message = BAD[name]
    given = dict(
        x=torch.randn(4, 6), weights=[torch.randn(5, 6), torch.randn(4, 6)], lora_As=[torch.randn(3, 2, 6)] * 2,
        lora_Bs=[torch.randn(5, 2), torch.randn(4, 2)], task_ids=torch.zeros(4, dtype=torch.long),
    )  # fmt: skip
    assert len(alora_linear_group(**given)) == 2
    with pytest.raises(error, match=re.escape(message)):
        alora_linear_group(**{**given, **changes})
