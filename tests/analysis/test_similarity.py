"""Cosine and subspace overlap against closed forms; what must not change them; the level of chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alora_kernels.analysis import IncomparableError, chance, cosine, pairwise, subspace_overlap

from ..support.refusals import refused
from .adapters import randn64 as randn
from .adapters import turned

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 12))
SEEDS = st.integers(0, 2**16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_is_one_and_opposite_is_minus_one(dtype, device):
    p = randn(4, 9).to(device, dtype)
    assert cosine(p, p) == pytest.approx(1.0, abs=1e-14)
    assert cosine(p, -p) == pytest.approx(-1.0, abs=1e-14)
    assert subspace_overlap(p, p) == pytest.approx(1.0, abs=1e-14)
    assert subspace_overlap(p, -p) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_orthogonal_is_zero(dtype):
    p, q = torch.zeros(2, 6, dtype=dtype), torch.zeros(3, 6, dtype=dtype)
    p[0, 0], p[1, 1], q[0, 2], q[1, 3], q[2, 4] = 1, 2, 3, 4, 5
    assert subspace_overlap(p, q) == 0.0
    assert cosine(p, p.roll(2, dims=1)) == 0.0


@pytest.mark.parametrize("theta", [0.0, 1e-3, math.pi / 6, math.pi / 4, 1.5, math.pi / 2])
def test_rotated_by_theta_is_cos_squared(theta):
    p, q = turned([theta] * 3, 10)
    assert subspace_overlap(p, q) == pytest.approx(math.cos(theta) ** 2, abs=1e-13)
    assert cosine(p, q) == pytest.approx(math.cos(theta), abs=1e-13)


def test_different_angles_are_averaged_over_the_smaller_space():
    angles = [0.0, 0.3, 1.1]
    p, q = turned(angles, 8)
    assert subspace_overlap(p, q) == pytest.approx(sum(math.cos(t) ** 2 for t in angles) / 3, abs=1e-13)
    assert subspace_overlap(p, q[:1]) == pytest.approx(1.0, abs=1e-13)  # q's first row lies in p
    assert subspace_overlap(p[:2], q[1:]) == pytest.approx(math.cos(0.3) ** 2 / 2, abs=1e-13)


def test_another_basis_of_the_same_space_changes_the_cosine_only():
    p = randn(4, 16)
    rotation = torch.linalg.qr(randn(4, 4, seed=1)).Q
    assert subspace_overlap(p, rotation @ p) == pytest.approx(1.0, abs=1e-13)
    assert abs(cosine(p, rotation @ p)) < 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_not_a_direction(dtype):
    """Rank 2 in 6 rows, rounded to the dtype: the four directions of rounding must not count."""
    p = (randn(6, 2) @ randn(2, 40, seed=1)).to(dtype)
    apart = randn(40, seed=2)
    plane = torch.linalg.svd(p.double(), full_matrices=False).Vh[:2]
    apart -= plane.T @ (plane @ apart)
    assert subspace_overlap(p, plane) == pytest.approx(1.0, abs=1e-13)
    assert subspace_overlap(p, apart[None]) == pytest.approx(0.0, abs=1e-13)
    if dtype != torch.float64:  # the same numbers, with every direction counted: rounding has a part along `apart`
        assert subspace_overlap(p, apart[None], tolerance=0.0) > 1e-3


def test_tolerance_is_a_share_of_the_frobenius_norm():
    p = torch.diag(torch.tensor([1.0, 1e-3, 0.0], dtype=torch.float64))
    q = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    assert subspace_overlap(p, q) == pytest.approx(1.0)
    assert subspace_overlap(p, q, tolerance=0.9e-3) == pytest.approx(1.0)
    assert subspace_overlap(p, q, tolerance=1.1e-3) == 0.0


def test_zero_matrices_have_no_direction():
    p, zero = randn(2, 5), torch.zeros(2, 5)
    for function in (cosine, subspace_overlap):
        assert math.isnan(function(p, zero))
        assert math.isnan(function(zero, p))
        assert math.isnan(function(zero, zero))


@pytest.mark.parametrize(("r1", "r2", "k"), [(4, 4, 32), (1, 1, 5), (2, 6, 20), (5, 3, 6), (8, 2, 6)])
def test_chance_against_random_subspaces(r1, r2, k):
    """400 draws; the bound is five standard errors of their mean, 6e-7 of false alarms were the seed not fixed."""
    draws = torch.tensor([subspace_overlap(randn(r1, k, seed=2 * i), randn(r2, k, seed=2 * i + 1)) for i in range(400)])
    bound = 5 * float(draws.std()) / math.sqrt(len(draws))
    assert bound < 0.06  # the test can tell r / k from its neighbours
    assert abs(float(draws.mean()) - chance(r1, r2, k)) <= bound + 1e-12


def test_chance_closed_forms():
    assert chance(8, 8, 576) == 8 / 576
    assert chance(2, 8, 64) == chance(8, 2, 64) == 8 / 64
    assert chance(100, 3, 64) == 1.0
    refused("at least 1", chance, 0, 1, 4)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=SEEDS, up=st.floats(-300, 300), down=st.floats(-300, 300))
def test_scale_changes_nothing(shape, seed, up, down):
    """Over 600 orders of magnitude, beyond where squares overflow or vanish."""
    p, q = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    large, small = p / p.abs().max() * 10.0**up, q / q.abs().max() * 10.0**down
    assert cosine(large, small) == pytest.approx(cosine(p, q), abs=1e-12)
    assert cosine(-large, small) == pytest.approx(-cosine(p, q), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(r1=st.integers(1, 5), r2=st.integers(1, 5), k=st.integers(5, 12), seed=SEEDS, scale=st.floats(1e-6, 1e6))
def test_overlap_depends_on_the_spaces_only(r1, r2, k, seed, scale):
    p, q = randn(r1, k, seed=seed), randn(r2, k, seed=seed + 1)
    want = subspace_overlap(p, q)
    assert 0.0 <= want <= 1.0
    assert subspace_overlap(q, p) == pytest.approx(want, abs=1e-10)
    rotation = torch.linalg.qr(randn(r1, r1, seed=seed + 2)).Q
    assert subspace_overlap(scale * rotation @ p, q) == pytest.approx(want, abs=1e-9)  # another basis of p's rows
    both = torch.linalg.qr(randn(k, k, seed=seed + 3)).Q
    assert subspace_overlap(p @ both, q @ both) == pytest.approx(want, abs=1e-9)  # both turned together
    assert subspace_overlap(torch.cat([p, p]), q) == pytest.approx(want, abs=1e-9)  # repeated rows add no direction


def test_pairwise_is_symmetric_with_nan_for_other_shapes():
    matrices = [randn(3, 8), randn(3, 8, seed=1), randn(2, 8, seed=2), randn(3, 7, seed=3), torch.zeros(3, 8)]
    cosines, overlaps = pairwise(matrices, cosine), pairwise(matrices, subspace_overlap)
    for table in (cosines, overlaps):
        assert table.shape == (5, 5) and table.dtype == torch.float64
        assert torch.equal(table.isnan(), table.isnan().T)
        torch.testing.assert_close(table, table.T, equal_nan=True, rtol=0, atol=0)
    assert cosines[0, 1] == cosine(matrices[0], matrices[1])
    assert cosines[0, 2].isnan() and not overlaps[0, 2].isnan()  # other ranks have no cosine but an overlap
    assert overlaps[0, 3].isnan() and overlaps[3, 3] == pytest.approx(1.0)
    assert cosines[4].isnan().all() and overlaps[4].isnan().all()  # zeros, on the diagonal too
    assert cosines.diagonal()[:4].tolist() == pytest.approx([1.0] * 4)


def test_pairwise_takes_a_stack_and_hides_no_other_error():
    stack = randn(3, 2, 6)
    assert pairwise(stack, cosine)[0, 2] == cosine(stack[0], stack[2])
    assert pairwise([], cosine).shape == (0, 0)
    bad = [randn(2, 6), torch.full((2, 6), float("inf"))]
    refused(r"matrices\[1\] holds NaN or infinity", pairwise, bad, cosine)

    def broken(p: Tensor, q: Tensor) -> float:
        raise ValueError("of its own")

    refused("of its own", pairwise, stack, broken)


@pytest.mark.parametrize("function", [cosine, subspace_overlap])
def test_bad_input_is_named(function):
    p = randn(2, 4)
    refused(r"\[2, 4\] and q \[2, 5\]", function, p, randn(2, 5), error=IncomparableError)
    refused("q holds NaN", function, p, p * float("nan"))
    refused(r"p must be a matrix, got shape \[3, 2, 4\]", function, randn(3, 2, 4), p)
    refused("q is empty", function, p, torch.zeros(0, 4))
    with pytest.raises(TypeError, match=r"p must be a tensor of a floating dtype, got torch.int64"):
        function(torch.ones(2, 4, dtype=torch.int64), p)
    refused("got list", function, p, [[1.0]], error=TypeError)


def test_a_graph_stays_out():
    p = randn(2, 4).requires_grad_()
    assert not pairwise([p, p], cosine).requires_grad
