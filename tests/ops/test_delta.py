"""`alora_delta`: the low-rank part added to any base's output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alora_kernels import alora_delta, alora_linear, reference
from tests.compare import assert_as_good_as_torch, over_a_base, problem, skip_unless_runnable


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_and_gradients(device, backend, routing, dtype):
    skip_unless_runnable(backend, device, dtype)
    p = problem((3, 7), 12, 10, 4, 3, routing=routing, dtype=dtype, device=device)
    assert_as_good_as_torch(p, over_a_base, dtype, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradcheck(backend):
    skip_unless_runnable(backend, "cpu", torch.float64)
    p = problem((5,), 7, 3, 2, 3, routing="soft", dtype=torch.float64)
    a, b, router = p.leaves["a"], p.leaves["b"], p.leaves["router"]

    def f(x, a, b, router, base):
        return alora_delta(x, a, b, router=router, base=base * 1.0, scaling=0.5, backend=backend)

    assert torch.autograd.gradcheck(f, (p.leaves["x"], a, b, router, torch.randn(5, 3).double().requires_grad_()))


def test_it_writes_into_the_base_output_where_autograd_allows():
    p = problem((2, 5), 6, 4, 2, 2, routing="task", dtype=torch.float32, bias=False)
    x, a, b = p.leaves["x"], p.leaves["a"], p.leaves["b"]
    base = F.linear(x, p.weight).clone()
    assert alora_delta(x, a, b, base=base, **p.given).data_ptr() == base.data_ptr()
    with torch.no_grad():
        base = F.linear(x, p.weight)
        assert alora_delta(x, a, b, base=base, **p.given).data_ptr() == base.data_ptr()
    leaf = torch.zeros(2, 5, 4, requires_grad=True)
    assert alora_delta(x, a, b, base=leaf, **p.given).data_ptr() != leaf.data_ptr()
    assert (leaf == 0).all()


def test_without_a_base_it_is_the_difference():
    p = problem((9,), 6, 4, 2, 3, routing="soft", dtype=torch.float64, bias=False)
    x, a, b, router = (p.leaves[k] for k in ("x", "a", "b", "router"))
    delta = alora_delta(x, a, b, router=router, scaling=0.5)
    whole = reference.alora_linear(x, p.weight, a, b, router=router, scaling=0.5)
    torch.testing.assert_close(delta, whole - F.linear(x, p.weight))


def test_it_equals_the_fused_layer_under_dropout():
    p = problem((11,), 6, 4, 2, 3, routing="task", dtype=torch.float32, bias=False)
    x, a, b = (p.leaves[k] for k in ("x", "a", "b"))
    torch.manual_seed(5)
    fused = alora_linear(x, p.weight, a, b, dropout_p=0.5, training=True, **p.given)
    torch.manual_seed(5)
    added = alora_delta(x, a, b, base=F.linear(x, p.weight), dropout_p=0.5, training=True, **p.given)
    torch.testing.assert_close(fused, added)


def test_wrong_base_shape_is_named():
    p = problem((4,), 6, 5, 2, 2, routing="task", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"base must be \(4, 5\).*got \(4, 6\)"):
        alora_delta(p.leaves["x"], p.leaves["a"], p.leaves["b"], base=torch.zeros(4, 6), **p.given)
