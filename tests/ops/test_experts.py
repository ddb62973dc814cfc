"""Adapted experts against `reference.alora_experts` in float64, values and every gradient, on both backends."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from alora_kernels import reference
from alora_kernels.ops.experts import (
    SortedRows,
    _as_a,
    _grouped_product,
    experts_linear,
    experts_shrink,
    recomputed,
    sort_by_expert,
)
from alora_kernels.routing import group_rows
from tests.compare import skip_unless_runnable

BACKENDS = ["torch", "triton"]
S = 0.3


@dataclass(frozen=True)
class Case:
    """Sizes, who shares A and B among the experts, how the router chose."""

    tokens: int = 13
    top: int = 2
    k: int = 10
    n: int = 7
    r: int = 3
    experts: int = 5
    tasks: int = 3
    each_a: bool = False
    each_b: bool = True
    chosen: str = "random"
    bias: bool = False
    transposed: bool = False
    per_token: bool = True
    fp32_adapters: bool = False
    strided: bool = False

    def __str__(self) -> str:
        return "-".join(str(v) for v in vars(self).values())


CASES = [
    Case(),
    Case(each_a=True),
    Case(each_b=False),
    Case(each_a=True, each_b=False, bias=True),
    Case(per_token=False),
    Case(each_a=True, per_token=False, transposed=True, bias=True),
    Case(chosen="dropped"),
    Case(chosen="dropped", bias=True, each_a=True),
    Case(chosen="twice"),
    Case(chosen="one expert"),
    Case(chosen="none", bias=True),
    Case(tokens=0),
    Case(tokens=1, top=1),
    Case(experts=1, tasks=1),
    Case(tokens=40, experts=3, tasks=9, k=33, n=18, r=8, transposed=True),
]


ROUNDED = [
    Case(tokens=64, k=48, n=40, r=8),
    Case(tokens=64, k=48, n=40, r=8, fp32_adapters=True),
    Case(tokens=40, k=64, n=48, r=16, bias=True, each_a=True),
    Case(tokens=40, k=33, n=18, r=1, strided=True),
    Case(tokens=40, k=32, n=48, r=33, each_b=False, transposed=True),
    Case(tokens=40, k=32, n=32, r=64, chosen="dropped", strided=True, per_token=False),
    Case(tokens=16, k=16, n=16, r=4, experts=64, tasks=8, each_a=True),  # 512 As, most of no row
    Case(tokens=16, k=16, n=16, r=4, experts=64, tasks=8, chosen="dropped"),
]


class Problem:
    """Random inputs; `leaves` have gradients."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.case = c = case
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(device)  # noqa: E731
        adapter = torch.float32 if c.fp32_adapters else dtype
        rows = c.tokens if c.per_token else c.tokens * c.top
        self.x = draw(c.k, rows).t().to(dtype) if c.strided else draw(rows, c.k).to(dtype)
        self.w = draw(c.experts, c.n, c.k).to(dtype)
        self.bias = draw(c.experts, c.n).to(dtype) if c.bias else None
        self.a = draw(c.tasks, *[c.experts] * c.each_a, c.r, c.k).to(adapter)
        self.b = draw(*[c.experts] * c.each_b, c.n, c.r).to(adapter)
        self.expert_ids = torch.randint(0, c.experts, (c.tokens, c.top)).to(device)
        if c.chosen == "dropped":
            self.expert_ids[::3] = c.experts
            self.expert_ids[1::5] = -1
        elif c.chosen == "twice":
            self.expert_ids[:] = self.expert_ids[:, :1]
        elif c.chosen == "one expert":
            self.expert_ids[:] = c.experts - 1
        elif c.chosen == "none":
            self.expert_ids[:] = c.experts
        self.task_ids = torch.randint(-1, c.tasks, (c.tokens,)).to(device)
        self.dy = draw(c.tokens * c.top, c.n)
        self.rows = sort_by_expert(self.expert_ids, c.experts)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in (self.x, self.a, self.b)]

    def fused(self, backend: str) -> tuple[Tensor, ...]:
        """y in the order of the router, and the gradients of x, A and B."""
        c, rows, (x, a, b) = self.case, self.rows, self.leaves()
        tasks = group_rows(self.task_ids, c.tasks)
        given = x if c.per_token else x[rows.source]
        h = experts_shrink(given, a, rows, tasks, scaling=S, per_token=c.per_token, backend=backend)
        weight = self.w.transpose(1, 2).contiguous() if c.transposed else self.w
        each = x[rows.token] if c.per_token else given
        bias = self.bias
        y = experts_linear(each, weight, h, b, rows, bias=bias, transposed=c.transposed, backend=backend)
        y = rows.restored(y)
        return (y, *torch.autograd.grad(y, (x, a, b), self.dy.to(y.dtype)))

    def right(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """The same by the specification."""
        c, (x, a, b) = self.case, self.leaves(dtype)
        given = x.repeat_interleave(c.top, 0) if c.per_token else x
        tasks = self.task_ids.repeat_interleave(c.top)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = reference.alora_experts(
            given, self.w.to(dtype), a, b, self.expert_ids.flatten(), tasks, bias=bias, scaling=S
        )
        return (y, *torch.autograd.grad(y, (x, a, b), self.dy.to(dtype)))


def error(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right.detach()).abs().max()) if right.numel() else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, backend):
    skip_unless_runnable(backend, "cpu", torch.float64)
    p = Problem(case, torch.float64)
    for found, right in zip(p.fused(backend), p.right(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_error_is_at_most_twice_that_of_torch(device, case, backend, dtype):
    skip_unless_runnable(backend, device, dtype)
    p = Problem(case, dtype, device)
    right, plain = p.right(), p.right(dtype)
    for found, theirs, truth in zip(p.fused(backend), plain, right, strict=True):
        assert found.shape == truth.shape and found.isfinite().all()
        allowed = 2 * error(theirs, truth) + torch.finfo(dtype).eps * float(truth.detach().abs().max())
        assert error(found, truth) <= allowed


@pytest.mark.parametrize(("k", "n"), [(16, 24), (10, 16), (16, 7), (10, 7)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_torchs_grouped_product_of_any_alignment(device, k, n, by_columns):
    x = torch.randn(12, 2 * k).to(device, torch.bfloat16)[:, k:]
    w = torch.randn(3, n, k).to(device, torch.bfloat16).transpose(1, 2)
    w = w if by_columns else w.contiguous()
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    y = _grouped_product(x, w, offsets)
    right = torch.cat([x[:4].double() @ w[0].double(), x[4:9].double() @ w[2].double(), y.new_zeros(3, n).double()])
    torch.testing.assert_close(y.double(), right, rtol=1e-2, atol=2e-2)
    assert not y[9:].any() and _grouped_product(x[:0], w, torch.zeros_like(offsets)).shape == (0, n)


def test_b_is_copied_where_its_rows_are_not_aligned():
    wide, narrow = torch.randn(3, 32, 16), torch.randn(3, 32, 8)
    assert _as_a(wide).data_ptr() == wide.data_ptr() and _as_a(narrow).stride() == (256, 32, 1)
    assert torch.equal(_as_a(narrow), narrow.transpose(1, 2))


def test_a_row_alone_is_the_row_of_the_batch():
    p = Problem(Case(tokens=20), torch.float64)
    y = p.fused("torch")[0].view(20, 2, -1)
    for token in range(0, 20, 3):
        alone = Problem(Case(tokens=20), torch.float64)
        alone.x, alone.dy = p.x[token : token + 1], p.dy[2 * token : 2 * token + 2]
        alone.expert_ids, alone.task_ids = p.expert_ids[token : token + 1], p.task_ids[token : token + 1]
        alone.rows = sort_by_expert(alone.expert_ids, 5)
        torch.testing.assert_close(alone.fused("torch")[0], y[token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(device, backend, dtype):
    skip_unless_runnable(backend, device, dtype)
    p = Problem(Case(tokens=40, each_a=True), dtype, device)
    for first, second in zip(p.fused(backend), p.fused(backend), strict=True):
        assert torch.equal(first, second)


def test_sorted_rows():
    ids = torch.tensor([[2, 0], [0, 5], [-1, 2]])
    rows = sort_by_expert(ids, 3)
    assert rows.ids.tolist() == [0, 0, 2, 2, 3, 3] and rows.offsets.tolist() == [0, 2, 2, 4]
    assert rows.token.tolist() == [0, 1, 0, 2, 1, 2]
    values = torch.arange(6.0)[:, None]
    assert torch.equal(rows.restored(values[rows.source]), values)


def test_the_gradient_of_sorted_rows_is_that_of_indexing():
    """And its own gradient: the rows are moved, nothing more."""
    ids = torch.tensor([[2, 0], [0, 5], [-1, 2]])
    rows = sort_by_expert(ids, 3)
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for move, index, given in ((rows.of_tokens, rows.token, x), (rows.restored, rows.places, y)):
        leaf = given.clone().requires_grad_()
        assert torch.equal(move(leaf), given[index])
        dy = torch.randn(6, 4, dtype=torch.float64)
        (found,) = torch.autograd.grad(move(leaf), leaf, dy)
        (right,) = torch.autograd.grad(leaf[index], leaf, dy)
        torch.testing.assert_close(found, right, rtol=1e-15, atol=1e-15)
        assert torch.autograd.gradcheck(move, leaf) and torch.autograd.gradgradcheck(move, leaf)


def test_nothing_of_x_or_of_a_weight_is_saved():
    p = Problem(Case(tokens=64, k=64, n=48), torch.float32)
    x, _, b = p.leaves()
    h = torch.randn(128, 3, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        rows = x[p.rows.token]
        experts_linear(rows, p.w, h, b, p.rows, backend="torch")
    assert rows.data_ptr() not in saved and x.data_ptr() not in saved
    assert p.w.data_ptr() in saved  # the parameter itself, no copy


def test_the_gate_is_worked_out_again():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    gate = lambda t: torch.nn.functional.silu(t[:, :3]) * t[:, 3:]  # noqa: E731
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = recomputed(gate, x)
    assert [t.shape for t in saved] == [x.shape]
    (found,) = torch.autograd.grad(y.sin().sum(), x)
    (right,) = torch.autograd.grad(gate(x).sin().sum(), x)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    skip_unless_runnable(backend, "cpu", torch.float32)
    p = Problem(Case(bias=True), torch.float32)
    x, _, b = p.leaves()
    h = torch.randn(26, 3, requires_grad=True)
    rows: SortedRows = p.rows
    torch.library.opcheck(
        torch.ops.alora.experts_linear, (x[rows.token], p.w, p.bias, h, b, rows.ids, rows.offsets, backend)
    )


def test_no_second_derivative():
    p = Problem(Case(), torch.float64)
    x, _, b = p.leaves()
    y = experts_linear(x[p.rows.token], p.w, torch.ones(26, 3, dtype=torch.float64), b, p.rows, backend="torch")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="alora_experts where second derivatives"):
        dx.sum().backward()
