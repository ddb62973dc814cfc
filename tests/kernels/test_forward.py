"""The forward launchers against plain torch: shrinks and expand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alora_kernels.kernels import expand, overlapping, overlaps_launches, shrink_soft, shrink_task

from .cases import CASES, DEVICE, Case, Layer, S, assert_close


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shrink_task(case: Case, dtype: torch.dtype) -> None:
    t = Layer(case, dtype)
    h = shrink_task(t.x, t.a, t.groups, scaling=S, dropout=t.drop)
    assert h.dtype == dtype
    assert_close(h, t.task_h, dtype, t.x, t.a)
    assert not h[t.onehot(dtype).sum(1) == 0].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shrink_soft(case: Case, dtype: torch.dtype) -> None:
    t = Layer(case, dtype)
    h, p = shrink_soft(t.x, t.a, t.router, scaling=S, dropout=t.drop)
    assert h.dtype == dtype
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(p, t.soft_p, dtype, t.x, t.a, t.router)
    assert_close(h, t.soft_h, dtype, t.x, t.a, t.router)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("case", [c for c in CASES if c.p == 0 or c.fp32_adapters], ids=str)
def test_expand(case: Case, dtype: torch.dtype, has_bias: bool) -> None:
    t = Layer(case, dtype)
    y = expand(t.x, t.w, t.bias if has_bias else None, t.h, t.b)

    def reference(x: Tensor, w: Tensor, bias: Tensor, h: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w, bias if has_bias else None) + h @ b.T

    assert y.dtype == dtype
    assert_close(y, reference, dtype, t.x, t.w, t.bias, t.h, t.b)


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gemm_beside_the_shrink(
    case: Case, dtype: torch.dtype, routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """h b^T comes last there; memory that nobody has written yet is NaN."""
    if dtype == torch.float64:
        pytest.skip("s is applied after the launch, which is not made yet")
    if not overlaps_launches(torch.device(DEVICE)):
        pytest.skip("launches overlap on Hopper and later")
    t, empty = Layer(case, dtype), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    soft = routing == "soft"
    with overlapping():
        if soft:
            h, p = shrink_soft(t.x, t.a, t.router, scaling=S, dropout=t.drop)
        else:
            h = shrink_task(t.x, t.a, t.groups, scaling=S, dropout=t.drop)
        y = expand(t.x, t.w, None if case.strided else t.bias, h, t.b)

    def reference(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
        low = t.soft_h(x, a, router) if soft else t.task_h(x, a)
        return torch.nn.functional.linear(x, w, None if case.strided else bias) + low @ b.T

    assert_close(y, reference, dtype, t.x, t.w, t.bias, t.a, t.b, t.router)
    if soft:
        assert_close(p, t.soft_p, dtype, t.x, t.a, t.router)


def test_expand_takes_a_transposed_weight() -> None:
    t = Layer(Case(k=33, n=35), torch.float32)
    transposed = t.w.t().contiguous().t()
    assert torch.equal(expand(t.x, transposed, None, t.h, t.b), expand(t.x, t.w, None, t.h, t.b))


def test_a_task_with_nan_leaves_the_others_alone() -> None:
    t = Layer(Case(m=20, e=3), torch.float32)
    clean = shrink_task(t.x, t.a, t.groups, scaling=S)
    t.a[1] = torch.nan
    h = shrink_task(t.x, t.a, t.groups, scaling=S)
    assert h[t.ids == 1].isnan().all()
    assert torch.equal(h[t.ids != 1], clean[t.ids != 1])


def test_shrink_soft_large_logits() -> None:
    t = Layer(Case(), torch.float32)
    h, p = shrink_soft(t.x, t.a, t.router * 1e4, scaling=S)
    best = p[:, -3:].argmax(1)
    picked = p[:, :-3].view(-1, 3, 4)[torch.arange(37, device=best.device), best]
    assert torch.isfinite(h).all()
    torch.testing.assert_close(h, S * picked)


def test_shrink_soft_refuses_too_many_experts() -> None:
    x, a = torch.zeros(2, 4), torch.zeros(1025, 1, 4)
    with pytest.raises(ValueError, match="1025"):
        shrink_soft(x, a, torch.zeros(1025, 4), scaling=1.0)
