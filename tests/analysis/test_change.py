"""Changes of columns and spectra of updates against closed forms and against the sum and product never built."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alora_kernels.analysis import change as module
from alora_kernels.analysis import column_change, matrix_spectrum, merged_change, update_spectrum

from ..support.refusals import refused
from .adapters import randn64 as randn


def turned_columns(w: Tensor, theta: float) -> Tensor:
    """Every column turned by theta towards a direction of its own, its length kept."""
    aside = randn(*w.shape, seed=9)
    unit = w / w.norm(dim=0)
    aside = aside - unit * (unit * aside).sum(0)
    return w.norm(dim=0) * (math.cos(theta) * unit + math.sin(theta) * aside / aside.norm(dim=0))


def plain(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The paper's formula, word for word."""
    magnitude = (after.norm(dim=0) - before.norm(dim=0)).abs().mean()
    return float(magnitude), float((1 - torch.cosine_similarity(before, after, dim=0)).mean())


def test_identical_is_exactly_zero(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        w = randn(6, 9).to(device, dtype)
        got = column_change(w, w)
        assert (got.magnitude, got.relative_magnitude, got.direction) == (0.0, 0.0, 0.0)
        assert (got.columns, got.without_direction) == (9, 0)


@pytest.mark.parametrize("factor", [0.25, 2.0, 3.0])
def test_longer_columns_change_in_length_only(factor):
    w = randn(6, 9)
    got = column_change(w, factor * w)
    assert got.direction == pytest.approx(0.0, abs=1e-30)
    assert got.relative_magnitude == pytest.approx(abs(factor - 1), rel=1e-14)
    assert got.magnitude == pytest.approx(abs(factor - 1) * float(w.norm(dim=0).mean()), rel=1e-14)


@pytest.mark.parametrize("theta", [1e-7, 1e-3, 0.5, math.pi / 2, 3.0])
def test_turned_columns_change_in_direction_only(theta):
    w = randn(6, 9)
    got = column_change(w, turned_columns(w, theta))
    exact = 2 * math.sin(theta / 2) ** 2  # 1 - cos, without its cancellation
    assert got.direction == pytest.approx(exact, rel=1e-7)  # 1e-7 of turning is known to 1e-16 / 1e-7
    assert got.relative_magnitude == pytest.approx(0.0, abs=1e-15)


def test_opposite_columns_are_two_apart():
    w = randn(4, 5)
    assert column_change(w, -w).direction == pytest.approx(2.0, rel=1e-14)
    assert column_change(w, -w).relative_magnitude == 0.0


def test_columns_not_rows():
    w = torch.eye(2, dtype=torch.float64)
    after = w @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    after[:, 0] += torch.tensor([0.0, 4.0], dtype=torch.float64)  # column 0: length 5 at cos 3 / 5; column 1 as it was
    got = column_change(w, after)
    assert got.magnitude == pytest.approx((5 - 1 + 0) / 2)
    assert got.direction == pytest.approx((1 - 3 / 5 + 0) / 2)
    assert column_change(w.T, after.T).direction != pytest.approx(got.direction)


def test_zero_columns_have_no_direction_and_are_counted():
    before, after = randn(4, 5), randn(4, 5, seed=1)
    before[:, 0], after[:, 3], before[:, 4], after[:, 4] = 0, 0, 0, 0
    got = column_change(before, after)
    assert (got.columns, got.without_direction) == (5, 3)
    assert got.direction == pytest.approx(plain(before[:, 1:3], after[:, 1:3])[1], rel=1e-12)
    assert got.magnitude == pytest.approx(plain(before, after)[0], rel=1e-12)  # a length of zero is a length
    start = column_change(torch.zeros(4, 5), after)  # B against its start
    assert math.isnan(start.direction) and math.isnan(start.relative_magnitude)
    assert start.without_direction == 5 and start.magnitude > 0


@pytest.mark.parametrize("block", [1, 6, 13, 60, 10_000])
def test_blocks_do_not_change_the_result(monkeypatch, block):
    before, after = randn(6, 10), randn(6, 10, seed=1)
    monkeypatch.setattr(module, "BLOCK", block)
    got = column_change(before, after)
    magnitude, direction = plain(before, after)
    assert got.magnitude == pytest.approx(magnitude, rel=1e-13)
    assert got.direction == pytest.approx(direction, rel=1e-13)
    assert got.columns == 10


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 6), k=st.integers(1, 8), seed=st.integers(0, 2**16), factor=st.floats(1e-3, 1e3))
def test_invariances(n, k, seed, factor):
    before, after = randn(n, k, seed=seed), randn(n, k, seed=seed + 1)
    got = column_change(before, after)
    assert got.direction == pytest.approx(plain(before, after)[1], rel=1e-10, abs=1e-14)
    back = column_change(after, before)
    assert back.magnitude == pytest.approx(got.magnitude) and back.direction == pytest.approx(got.direction)
    scaled = column_change(factor * before, factor * after)
    assert scaled.relative_magnitude == pytest.approx(got.relative_magnitude, rel=1e-9)
    assert scaled.direction == pytest.approx(got.direction, rel=1e-9)
    rotation = torch.linalg.qr(randn(n, n, seed=seed + 2)).Q
    turned = column_change(rotation @ before, rotation @ after)
    assert turned.magnitude == pytest.approx(got.magnitude, rel=1e-9, abs=1e-13)
    assert turned.direction == pytest.approx(got.direction, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_is_the_change_to_the_sum(dtype, device):
    w, a, b = (t.to(device, dtype) for t in (randn(12, 9), randn(3, 9, seed=1), 1e-3 * randn(12, 3, seed=2)))
    got = merged_change(w, a, b, 0.5)
    want = column_change(w, w.double() + 0.5 * b.double() @ a.double())
    assert got.magnitude == pytest.approx(want.magnitude, rel=1e-9)
    assert got.direction == pytest.approx(want.direction, rel=1e-9)
    assert merged_change(w, a, torch.zeros_like(b), 0.5).direction == 0.0
    assert merged_change(w, a, b, 0.0).magnitude == 0.0


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returned, views of its arguments aside."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view and "detach" not in str(func):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_merging_builds_less_than_one_matrix(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2**10)
    w, a, b = randn(64, 256).bfloat16(), randn(4, 256, seed=1), randn(64, 4, seed=2)
    with Largest() as largest:
        merged_change(w, a, b, 1.0)
    assert 0 < largest.entries <= 2**10 < w.numel()
    with Largest() as whole:
        w + b @ a
    assert whole.entries == w.numel()  # the measurement sees such a matrix when there is one


def test_bad_input_is_named():
    w, a, b = randn(6, 5), randn(2, 5), randn(6, 2)
    refused(r"before \[6, 5\] and after \[5, 6\]", column_change, w, w.T)
    refused("after holds NaN or infinity", column_change, w, w / 0)
    refused("have different ranks", merged_change, w, a[:1], b, 1.0)
    refused(r"w \[5, 6\] must be \[N, K\] = \[6, 5\]", merged_change, w.T, a, b, 1.0)
    refused("scaling must be a finite number", merged_change, w, a, b, float("nan"))
    refused("one task's slice", merged_change, w, a[None], b, 1.0)


def planted(values: list[float], n: int, k: int) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R] whose product has the given singular values, split unevenly between the two."""
    r = len(values)
    sigma = torch.tensor(values, dtype=torch.float64)
    left, right = torch.linalg.qr(randn(n, r)).Q, torch.linalg.qr(randn(k, r, seed=1)).Q
    mix = randn(r, r, seed=2)
    return torch.linalg.inv(mix) @ right.T, left @ torch.diag(sigma) @ mix


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [5.0, 3.0, 1.0, 0.5], [1.0, 1e-8]])
def test_planted_values_come_back(values, device):
    a, b = planted(values, 20, 15)
    got = update_spectrum(a.to(device), b.to(device), -0.5)
    want = [0.5 * v for v in values]
    assert list(got.singular_values) == pytest.approx(want, rel=1e-6, abs=1e-14)
    assert got.frobenius == pytest.approx(math.hypot(*want), rel=1e-12)
    assert got.stable_rank == pytest.approx(sum(v * v for v in want) / want[0] ** 2, rel=1e-12)
    shares = [v / sum(want) for v in want]
    assert got.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-9)


@pytest.mark.parametrize("r", [1, 4, 7])
def test_equal_values_have_full_rank(r):
    got = matrix_spectrum(3 * torch.eye(r, dtype=torch.float32))
    assert got.effective_rank == pytest.approx(r) and got.stable_rank == pytest.approx(r)
    assert got.frobenius == pytest.approx(3 * math.sqrt(r))


def test_one_direction_is_rank_one_however_many_rows():
    got = update_spectrum(randn(1, 9).repeat(4, 1), randn(7, 4))
    assert got.effective_rank == pytest.approx(1.0, abs=1e-12)
    assert got.stable_rank == pytest.approx(1.0, abs=1e-12)
    assert len(got.singular_values) == 4


@pytest.mark.parametrize(("n", "k", "r"), [(12, 9, 3), (5, 30, 8), (30, 5, 8), (1, 6, 2), (4, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_update_is_the_product(n, k, r, dtype):
    a, b = randn(r, k).to(dtype), randn(n, r, seed=1).to(dtype)
    got, want = update_spectrum(a, b, 2.0), matrix_spectrum(2.0 * b.double() @ a.double())
    count = min(n, k, r)
    assert len(got.singular_values) == count
    assert list(got.singular_values) == pytest.approx(list(want.singular_values[:count]), rel=1e-11)
    for field in ("effective_rank", "stable_rank", "frobenius"):
        assert getattr(got, field) == pytest.approx(getattr(want, field), rel=1e-9)


def test_the_product_is_never_built():
    a, b = randn(4, 300), randn(200, 4, seed=1)
    with Largest() as largest:
        update_spectrum(a, b)
    assert 0 < largest.entries <= 300 * 4 < 200 * 300


def test_zeros_have_no_rank():
    for got in (matrix_spectrum(torch.zeros(3, 4)), update_spectrum(randn(2, 4), torch.zeros(3, 2))):
        assert math.isnan(got.effective_rank) and math.isnan(got.stable_rank)
        assert got.frobenius == 0.0 and set(got.singular_values) == {0.0}


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 8), k=st.integers(1, 8), r=st.integers(1, 4), seed=st.integers(0, 2**16), s=st.floats(1e-3, 1e3)
)
def test_invariances_of_spectra(n, k, r, seed, s):
    a, b = randn(r, k, seed=seed), randn(n, r, seed=seed + 1)
    got, scaled = update_spectrum(a, b), update_spectrum(a, b, s)
    # exp(entropy) >= 1 / max p = sum sigma / sigma_1 >= sum sigma^2 / sigma_1^2
    assert 1 <= got.stable_rank <= got.effective_rank + 1e-9 <= min(n, k, r) + 2e-9
    assert scaled.frobenius == pytest.approx(s * got.frobenius, rel=1e-10)
    assert scaled.effective_rank == pytest.approx(got.effective_rank, rel=1e-9)
    assert scaled.stable_rank == pytest.approx(got.stable_rank, rel=1e-9)
    rotation = torch.linalg.qr(randn(r, r, seed=seed + 2)).Q
    turned = update_spectrum(rotation @ a, b @ rotation.T)
    assert list(turned.singular_values) == pytest.approx(list(got.singular_values), rel=1e-8, abs=1e-12)
    flipped = update_spectrum(b.T, a.T)
    assert list(flipped.singular_values) == pytest.approx(list(got.singular_values), rel=1e-8, abs=1e-12)


def test_bad_input_of_spectra_is_named():
    refused(r"a \[3, 5\] and b \[6, 2\] have different ranks", update_spectrum, randn(3, 5), randn(6, 2))
    refused("b holds NaN", update_spectrum, randn(2, 5), randn(6, 2) * float("nan"))
    refused("scaling must be a finite number, got inf", update_spectrum, randn(2, 5), randn(6, 2), float("inf"))
    refused("matrix must be a matrix", matrix_spectrum, randn(2, 3, 4))
