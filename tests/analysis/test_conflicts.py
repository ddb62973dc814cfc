"""Planted conflicts: angles that were put in come back out, and each pair is counted once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_kernels.analysis import NotFiniteError, compare

from .draws import randn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opposite_gradients_conflict(dtype, device):
    g = randn(4, 6).to(device, dtype)
    got = compare({"x": g, "y": -2 * g}, module="layer", parameter="B")
    assert (got.pairs, got.conflicts, got.shared, got.sharing) == (1, 1, True, "shared")
    torch.testing.assert_close(got.cosine, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))
    assert got.norms == pytest.approx((float(g.double().norm()), 2 * float(g.double().norm())))
    assert got.norm == pytest.approx(1.5 * float(g.double().norm()))
    assert (got.module, got.parameter, got.tasks) == ("layer", "B", ("x", "y"))


def test_orthogonal_and_equal_gradients_do_not_conflict():
    one, other = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    assert compare({"x": one, "y": other}).conflicts == 0
    assert compare({"x": one, "y": other}).cosine[0, 1] == 0.0
    assert compare({"x": one, "y": 3 * one}).conflicts == 0
    assert compare({"x": one, "y": 3 * one}).cosine[0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize("degrees", [1, 60, 89, 91, 120, 179])
def test_a_planted_angle_comes_back(degrees):
    basis = torch.linalg.qr(randn(12, 12)).Q
    theta = math.radians(degrees)
    got = compare({"x": basis[0] * 5, "y": math.cos(theta) * basis[0] + math.sin(theta) * basis[1]})
    assert got.cosine[0, 1] == pytest.approx(math.cos(theta), abs=1e-14)
    assert got.conflicts == (degrees > 90)


def test_mixtures_count_each_pair_once():
    e = torch.eye(3, dtype=torch.float64)
    gradients = {"a": e[0], "b": -e[0] + e[1], "c": e[1], "d": -e[1], "e": e[2]}
    got = compare(gradients)
    conflicting = {("a", "b"), ("b", "d"), ("c", "d")}
    found = {(s, t) for i, s in enumerate(gradients) for j, t in enumerate(gradients) if i < j and got.cosine[i, j] < 0}
    assert found == conflicting
    assert (got.pairs, got.conflicts) == (10, 3)
    assert got.cosine[0, 1] == pytest.approx(-math.sqrt(0.5))


def test_a_gradient_of_zero_is_no_pair():
    g = randn(3, 4)
    got = compare({"x": g, "y": 0 * g, "z": -g})
    assert (got.pairs, got.conflicts) == (1, 1)
    assert got.cosine[1].isnan().all() and got.norms[1] == 0.0
    assert got.shared


def test_slices_of_their_own_never_meet_unless_two_tasks_train_one():
    g = randn(2, 5)
    stacks = torch.zeros(4, 3, 2, 5, dtype=torch.float64)  # four data sets on a stack of three
    stacks[0, 0], stacks[1, 1], stacks[2, 2], stacks[3, 2] = g, -g, g, -g
    apart = compare({"a": stacks[0], "b": stacks[1], "c": stacks[2]}, routed=True)
    assert (apart.pairs, apart.conflicts, apart.sharing) == (0, 0, "per task")
    assert apart.norms == pytest.approx([float(g.norm())] * 3)
    assert torch.equal(apart.cosine.isnan(), ~torch.eye(3, dtype=torch.bool))
    same = compare(dict(zip("abcd", stacks)), routed=True)
    assert (same.pairs, same.conflicts, same.sharing) == (1, 1, "shared")
    unrouted = compare({"a": stacks[0], "b": stacks[1]})
    assert (unrouted.pairs, unrouted.conflicts, unrouted.sharing) == (1, 0, "shared")


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.integers(2, 5), n=st.integers(1, 5), seed=st.integers(0, 2**16),
    scales=st.lists(st.floats(1e-30, 1e30), min_size=5, max_size=5),
)  # fmt: skip
def test_invariances(tasks, n, seed, scales):
    gradients = {f"t{i}": randn(n, 4, seed=seed + i) for i in range(tasks)}
    got = compare(gradients)
    assert got.pairs == tasks * (tasks - 1) // 2
    assert torch.equal(got.cosine, got.cosine.T) or torch.allclose(got.cosine, got.cosine.T, atol=1e-15)
    scaled = compare({t: g * s for (t, g), s in zip(gradients.items(), scales)})
    torch.testing.assert_close(scaled.cosine, got.cosine, rtol=0, atol=1e-12)
    rotation = torch.linalg.qr(randn(n, n, seed=seed + 99)).Q
    turned = compare({t: rotation @ g for t, g in gradients.items()})
    torch.testing.assert_close(turned.cosine, got.cosine, rtol=0, atol=1e-12)
    assert turned.norms == pytest.approx(got.norms, rel=1e-10)
    opposite = compare({t: (-1) ** i * g for i, (t, g) in enumerate(gradients.items())})
    signs = torch.tensor([(-1.0) ** i for i in range(tasks)], dtype=torch.float64)
    torch.testing.assert_close(opposite.cosine, got.cosine * signs * signs[:, None], rtol=0, atol=1e-14)


def test_compare_names_what_is_wrong():
    g = randn(2, 3)
    for too_few, named in (({}, "none"), ({"only": g}, "only")):
        with pytest.raises(ValueError, match=f"at least two, got {named}"):
            compare(too_few)
    with pytest.raises(ValueError, match=r"one shape, got \{'x': \[2, 3\], 'y': \[3, 2\]\}"):
        compare({"x": g, "y": g.T})
    with pytest.raises(NotFiniteError, match=r"layers.3.q_proj B not finite: \['y'\]"):
        compare({"x": g, "y": g * float("nan")}, module="layers.3.q_proj", parameter="B")


def test_a_graph_behind_the_gradients_stays_out():
    g = randn(2, 3).requires_grad_()
    assert not compare({"x": g, "y": 2 * g}).cosine.requires_grad
