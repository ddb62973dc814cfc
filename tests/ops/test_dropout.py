"""Dropout inside the op: one mask per layer, a function of torch's generator, the same when recomputed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from alora_kernels import alora_linear, reference
from tests.compare import problem, skip_unless_runnable

BACKENDS = ["torch", "triton"]


def mask_of(backend: str, rows: int, k: int, p: float) -> torch.Tensor:
    """Read the mask off the layer itself: A and B are identities, x is one."""
    eye = torch.eye(k)
    return alora_linear(
        torch.ones(rows, k), torch.zeros(k, k), eye[None], eye, task_ids=torch.zeros(rows, dtype=torch.long),
        dropout_p=p, training=True, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_the_reference_on_masked_x(backend, routing):
    skip_unless_runnable(backend, "cpu", torch.float64)
    rows, k, p = 20, 12, 0.4
    torch.manual_seed(7)
    mask = mask_of(backend, rows, k, p).double()
    case = problem((rows,), k, 9, 3, 3, routing=routing, dtype=torch.float64, bias=False)

    def masked_reference(x, weight, a, b, router=None, **given):
        # the router and the base see x, only the low-rank path sees dropped x
        gate = reference.gate(x, a.shape[0], router, given.get("task_ids"))
        h = torch.einsum("me,mer->mr", gate, torch.einsum("mk,erk->mer", x * mask, a))
        return x @ weight.t() + given["scaling"] * h @ b.t()

    truth = case.step(masked_reference)
    torch.manual_seed(7)
    ours = case.step(alora_linear, dropout_p=p, training=True, backend=backend)
    for name, t in truth.items():
        torch.testing.assert_close(ours[name], t, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keep_rate_and_scale(backend):
    skip_unless_runnable(backend, "cpu", torch.float32)
    mask = mask_of(backend, 64, 32, 0.25)
    kept = mask != 0
    assert 0.70 < kept.float().mean() < 0.80
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / 0.75))
    assert not torch.equal(mask, mask_of(backend, 64, 32, 0.25))


@pytest.mark.parametrize("backend", BACKENDS)
def test_off_in_evaluation_and_all_dropped_at_one(backend):
    skip_unless_runnable(backend, "cpu", torch.float32)
    p = problem((8,), 6, 5, 2, 2, routing="task", dtype=torch.float32, bias=False)
    x, a, b = (p.leaves[k] for k in ("x", "a", "b"))
    plain = alora_linear(x, p.weight, a, b, **p.given, backend=backend)
    assert torch.equal(plain, alora_linear(x, p.weight, a, b, dropout_p=0.5, **p.given, backend=backend))
    dropped = alora_linear(x, p.weight, a, b, dropout_p=1.0, training=True, **p.given, backend=backend)
    torch.testing.assert_close(dropped, x @ p.weight.t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_draws_the_same_mask(backend):
    skip_unless_runnable(backend, "cpu", torch.float32)
    p = problem((16,), 8, 8, 2, 2, routing="task", dtype=torch.float32)

    def layer(x, weight, a, b, **options):
        return alora_linear(x, weight, a, b, dropout_p=0.5, training=True, backend=backend, **options)

    def recomputed(*args, **options):
        return checkpoint(layer, *args, use_reentrant=False, **options)

    torch.manual_seed(3)
    plain = p.step(layer)
    torch.manual_seed(3)
    again = p.step(recomputed)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_probability_is_checked():
    p = problem((4,), 6, 5, 2, 2, routing="task", dtype=torch.float32)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        alora_linear(p.leaves["x"], p.weight, p.leaves["a"], p.leaves["b"], dropout_p=1.5, **p.given)
