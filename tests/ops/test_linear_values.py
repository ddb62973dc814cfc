"""Values and every gradient of the op against float64, both backends, both routings."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from alora_kernels import alora_linear, reference
from tests.compare import assert_as_good_as_torch, problem, skip_unless_runnable


@dataclass(frozen=True)
class Case:
    leading: tuple[int, ...]
    k: int
    n: int
    r: int
    e: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.leading))}-k{self.k}-n{self.n}-r{self.r}-e{self.e}"


CASES = [
    Case((0,), 5, 3, 2, 2),
    Case((1,), 1, 1, 1, 1),
    Case((7,), 5, 3, 1, 3),
    Case((3, 5), 17, 33, 4, 3),
    Case((2, 3, 4), 16, 16, 8, 1),
    Case((33,), 48, 40, 16, 3),
    Case((40,), 35, 50, 33, 2),
    Case((21,), 24, 18, 8, 17),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_and_gradients(device, backend, routing, case, dtype):
    skip_unless_runnable(backend, device, dtype)
    p = problem(case.leading, case.k, case.n, case.r, case.e, routing=routing, dtype=dtype, device=device)
    assert_as_good_as_torch(p, alora_linear, dtype, backend=backend)


ORDERS = {
    "sorted": torch.arange(24) // 6,
    "shuffled": torch.randperm(24, generator=torch.Generator().manual_seed(3)) % 4,
    "all equal": torch.full((24,), 2),
    "all base": torch.full((24,), -1),
    "one absent": torch.arange(24) % 3,
    "int32": (torch.arange(24) % 4).int(),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_order_of_tasks(device, backend, order):
    skip_unless_runnable(backend, device, torch.float32)
    p = problem((24,), 20, 19, 4, 4, routing="task", dtype=torch.float32, device=device, ids=ORDERS[order])
    assert_as_good_as_torch(p, alora_linear, torch.float32, backend=backend)
    da = p.step(alora_linear, backend=backend)["da"]
    present = set(ORDERS[order].tolist())
    for task in range(4):
        assert bool((da[task] == 0).all()) == (task not in present)


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradcheck(backend, routing):
    skip_unless_runnable(backend, "cpu", torch.float64)
    p = problem((5,), 7, 3, 2, 3, routing=routing, dtype=torch.float64)
    names = list(p.leaves)

    def layer(*leaves):
        named = dict(zip(names, leaves, strict=True))
        x, a, b = (named.pop(k) for k in ("x", "a", "b"))
        return alora_linear(x, p.weight, a, b, **named, **p.given, backend=backend)

    assert torch.autograd.gradcheck(layer, tuple(p.leaves.values()), fast_mode=False)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["strided rows", "transposed", "expanded"])
def test_non_contiguous_x(device, backend, layout):
    skip_unless_runnable(backend, device, torch.float32)
    p = problem((6, 8), 10, 9, 4, 3, routing="task", dtype=torch.float32, device=device)
    wide = torch.randn(6, 8, 20, device=device)
    x = {
        "strided rows": wide[..., ::2],
        "transposed": torch.randn(10, 8, 6, device=device).permute(2, 1, 0),
        "expanded": torch.randn(1, 8, 10, device=device).expand(6, 8, 10),
    }[layout]
    p.leaves["x"] = x.detach().requires_grad_()
    assert not p.leaves["x"].is_contiguous()
    assert_as_good_as_torch(p, alora_linear, torch.float32, backend=backend)


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_float32_adapter_over_a_half_precision_base(device, backend, routing, low):
    skip_unless_runnable(backend, device, low)
    p = problem((20,), 32, 24, 8, 3, routing=routing, dtype=low, device=device)
    for name in ("a", "b", "router"):
        if name in p.leaves:
            p.leaves[name] = p.leaves[name].detach().float().requires_grad_()
    # kernels multiply in the dtype of x; `test_mixed_dtypes` asks more of the torch backend
    truth, torchs = p.to(torch.float64).step(reference.alora_linear), p.to(low).step(reference.alora_linear)
    ours = p.step(alora_linear, backend=backend)
    assert ours["y"].dtype == ours["dx"].dtype == low
    assert ours["da"].dtype == ours["db"].dtype == torch.float32
    for name, t in truth.items():
        own = (torchs[name].double() - t).abs().max()
        assert (ours[name].double() - t).abs().max() <= 2 * own + 1e-3, name


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_same_inputs_give_the_same_bits(device, backend, routing):
    skip_unless_runnable(backend, device, torch.float32)
    p = problem((50,), 30, 20, 4, 3, routing=routing, dtype=torch.float32, device=device)
    first, second = (p.step(alora_linear, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nan_in_one_row_stays_in_that_row():
    p = problem((6,), 8, 5, 2, 3, routing="task", dtype=torch.float32)
    x = p.leaves["x"].detach().clone()
    x[2] = float("nan")
    y = alora_linear(x, p.weight, p.leaves["a"], p.leaves["b"], **p.given)
    assert y[2].isnan().all()
    assert not y[[0, 1, 3, 4, 5]].isnan().any()


def test_weight_never_gets_a_gradient():
    p = problem((4,), 6, 5, 2, 2, routing="task", dtype=torch.float32)
    w = p.weight.requires_grad_()
    alora_linear(p.leaves["x"], w, p.leaves["a"], p.leaves["b"], **p.given).sum().backward()
    assert w.grad is None
    assert p.leaves["a"].grad is not None


def test_nothing_of_output_size_is_saved():
    m, k, n, r, e = 64, 16, 128, 4, 8
    for routing in ("task", "soft"):
        p = problem((m,), k, n, r, e, routing=routing, dtype=torch.float32)
        saved: list[tuple[int, ...]] = []

        def pack(t, saved=saved):
            saved.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            leaves = dict(p.leaves)
            alora_linear(leaves.pop("x"), p.weight, leaves.pop("a"), leaves.pop("b"), **leaves, **p.given)
        assert (m, n) not in saved
        assert max(shape[0] * shape[1] for shape in saved if len(shape) == 2 and shape[0] == m) <= m * (e * r + e)
        assert not any(len(shape) == 3 and m in shape for shape in saved)
