"""The backward launchers against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alora_kernels import kernels as ak
from alora_kernels.kernels import da_soft, da_task, dx_soft, dx_task, expand_backward, gate_backward
from alora_kernels.routing import RowGroups

from .cases import CASES, DEVICE, Case, Layer, S, assert_close, meta


@pytest.mark.parametrize("case", [c for c in CASES if c.p == 0 or c.fp32_adapters], ids=str)
def test_expand_backward(case: Case, dtype: torch.dtype) -> None:
    t = Layer(case, dtype)
    dh, db = expand_backward(t.dy, t.b, t.h, scaling=S)
    assert dh.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert db.dtype == t.b.dtype
    assert_close(dh, lambda dy, b: S * (dy @ b), dtype, t.dy, t.b)
    assert_close(db, lambda dy, h: dy.T @ h, dtype, t.dy, t.h)


@pytest.mark.parametrize("case", [c for c in CASES if c.p == 0], ids=str)
def test_gate_backward(case: Case, dtype: torch.dtype) -> None:
    t = Layer(case, dtype)
    dp = gate_backward(t.dh, t.p, case.e, dtype=dtype)

    def reference(dh: Tensor, p: Tensor) -> Tensor:
        with torch.enable_grad():
            p = p.detach().requires_grad_()
            gate = p[:, -case.e :].softmax(1)
            h = torch.einsum("me,mer->mr", gate, p[:, : -case.e].reshape(-1, case.e, case.r))
            return torch.autograd.grad(h, p, dh)[0]

    assert dp.dtype == dtype
    assert_close(dp, reference, dtype, t.dh, t.p)


@pytest.mark.parametrize("base", [True, False], ids=["base", "low-rank"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dx_task(case: Case, dtype: torch.dtype, base: bool) -> None:
    t = Layer(case, dtype)
    dy, w = (t.dy, t.w) if base else (None, None)
    dx = dx_task(dy, w, t.dh, t.a, t.groups, dtype=dtype, dropout=t.drop)

    def reference(dy: Tensor, w: Tensor, dh: Tensor, a: Tensor) -> Tensor:
        low = t.dropped(torch.einsum("me,mr,erk->mk", t.onehot(dh.dtype), dh, a))
        return dy @ w + low if base else low

    assert dx.dtype == dtype
    assert_close(dx, reference, dtype, t.dy, t.w, t.dh, t.a)


@pytest.mark.parametrize("case", [c for c in CASES if c.p == 0], ids=str)
def test_dx_task_onto_what_is_there(case: Case, dtype: torch.dtype) -> None:
    """Rows of no task hold anything before, and zero afterwards."""
    t = Layer(case, dtype)
    task = t.onehot(t.x.dtype).sum(1, keepdim=True)
    there = torch.where(task > 0, t.x, float("nan")).contiguous()
    dx = dx_task(None, None, t.dh, t.a, t.groups, dtype=dtype, onto=there)
    assert dx.data_ptr() == there.data_ptr()
    low = lambda x, dh, a: task.to(x.dtype) * x + torch.einsum("me,mr,erk->mk", t.onehot(dh.dtype), dh, a)  # noqa: E731
    assert_close(dx, low, dtype, t.x, t.dh, t.a)


@pytest.mark.parametrize("base", [True, False], ids=["base", "low-rank"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dx_soft(case: Case, dtype: torch.dtype, base: bool) -> None:
    t = Layer(case, dtype)
    dy, w = (t.dy, t.w) if base else (None, None)
    dx = dx_soft(dy, w, t.dp, t.a, t.router, dtype=dtype, dropout=t.drop)

    def reference(dy: Tensor, w: Tensor, dp: Tensor, a: Tensor, router: Tensor) -> Tensor:
        low = t.dropped(dp[:, : -case.e] @ a.flatten(0, 1)) + dp[:, -case.e :] @ router
        return dy @ w + low if base else low

    assert dx.dtype == dtype
    assert_close(dx, reference, dtype, t.dy, t.w, t.dp, t.a, t.router)


def test_dx_wants_both_dy_and_w_or_neither() -> None:
    t = Layer(Case(), torch.float32)
    with pytest.raises(ValueError, match="both dy and w"):
        dx_task(t.dy, None, t.dh, t.a, t.groups, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_da_task(case: Case, dtype: torch.dtype) -> None:
    t = Layer(case, dtype)
    da = da_task(t.dh, t.x, t.groups, case.e, dropout=t.drop, dtype=t.a.dtype)

    def reference(dh: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("me,mr,mk->erk", t.onehot(x.dtype), dh, t.dropped(x))

    assert da.dtype == t.a.dtype
    assert_close(da, reference, dtype, t.dh, t.x)
    absent = t.onehot(dtype).sum(0) == 0
    assert not da[absent].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_da_soft(case: Case, dtype: torch.dtype) -> None:
    t = Layer(case, dtype)
    da, drouter = da_soft(t.dp, t.x, case.e, dropout=t.drop, dtype=t.a.dtype)
    shape = (case.e, case.r, case.k)
    assert da.dtype == drouter.dtype == t.a.dtype
    assert_close(da, lambda dp, x: (dp[:, : -case.e].T @ t.dropped(x)).view(shape), dtype, t.dp, t.x)
    assert_close(drouter, lambda dp, x: dp[:, -case.e :].T @ x, dtype, t.dp, t.x)
    assert da.untyped_storage().data_ptr() != drouter.untyped_storage().data_ptr()


def test_sum_partials() -> None:
    first, second = torch.randn(5, 3, 700, device=DEVICE), torch.randn(2, 1100, 2, device=DEVICE)
    one, two = ak.sum_partials(first, second, torch.float32, torch.float16)
    assert (one.dtype, two.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(one, first.sum(0))
    torch.testing.assert_close(two, second.sum(0).half())
    parts = torch.randn(3, 8, 5, device=DEVICE)
    one, two = ak.sum_partials(parts[:, :5], parts[:, 5:], torch.float32, torch.float32)
    torch.testing.assert_close(torch.cat([one, two]), parts.sum(0))


def test_sum_partials_of_one_plane_launches_nothing() -> None:
    plane = torch.randn(1, 4, 4, dtype=torch.bfloat16, device="meta")
    with ak.recording("sm_90") as launches:
        one, two = ak.sum_partials(plane, plane[:, :0], torch.bfloat16, torch.bfloat16)
    assert launches == [] and (one.shape, two.numel()) == ((4, 4), 0)


@pytest.mark.parametrize(("routing", "most"), [("task", 5), ("soft", 6)])
def test_launches_of_a_backward(routing: str, most: int) -> None:
    m, k, n, r, e = 8192, 4096, 4096, 16, 8
    x, w, a, b, dy, h = meta(m, k), meta(n, k), meta(e, r, k), meta(n, r), meta(m, n), meta(m, r)
    ids = meta(m, dtype=torch.int32)
    groups = RowGroups(ids, ids, meta(e + 1, dtype=torch.int32))
    with ak.recording("sm_90") as launches:
        dh, _ = ak.expand_backward(dy, b, h, scaling=1.0)
        if routing == "task":
            ak.dx_task(dy, w, dh, a, groups, dtype=x.dtype)
            ak.da_task(dh, x, groups, e, dtype=x.dtype)
        else:
            dp = ak.gate_backward(dh, meta(m, e * r + e, dtype=torch.float32), e, dtype=x.dtype)
            ak.dx_soft(dy, w, dp, a, meta(e, k), dtype=x.dtype)
            ak.da_soft(dp, x, e, dtype=x.dtype)
    assert len(launches) <= most
