"""Spectra against closed forms and against the product that is never built."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alora_kernels.analysis import matrix_spectrum, update_spectrum

from .draws import randn
from .test_change import Largest


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
def test_invariances(n, k, r, seed, s):
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


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"a \[3, 5\] and b \[6, 2\] have different ranks"):
        update_spectrum(randn(3, 5), randn(6, 2))
    with pytest.raises(ValueError, match="b holds NaN"):
        update_spectrum(randn(2, 5), randn(6, 2) * float("nan"))
    with pytest.raises(ValueError, match="scaling must be a finite number, got inf"):
        update_spectrum(randn(2, 5), randn(6, 2), float("inf"))
    with pytest.raises(ValueError, match="matrix must be a matrix"):
        matrix_spectrum(randn(2, 3, 4))
