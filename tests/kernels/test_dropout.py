"""The dropout mask: one for all kernels, the right share kept, another one for another seed."""

from __future__ import annotations

import pytest
import torch

from alora_kernels.kernels import Dropout, da_soft, da_task, dropout_mask, dx_task, shrink_task
from alora_kernels.routing import group_rows

from .cases import DEVICE


def seed(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keeps_the_right_share(p: float) -> None:
    mask = dropout_mask(128, 257, Dropout(p, seed(7)), dtype=torch.float32)
    kept = (mask != 0).double().mean().item()
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(kept - (1 - p)) < 5 * sigma
    torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - p)))
    lanes = (mask[:, :256] != 0).double().view(128, 64, 4).mean((0, 1))
    assert (lanes - (1 - p)).abs().max() < 5 * 2 * sigma


@pytest.mark.parametrize(("p", "value"), [(0.0, 1.0), (1.0, 0.0)])
def test_extreme_probabilities(p: float, value: float) -> None:
    assert (dropout_mask(5, 7, Dropout(p, seed(1)), dtype=torch.float32) == value).all()


def test_the_mask_does_not_depend_on_the_size() -> None:
    drop = Dropout(0.5, seed(3))
    large, small = dropout_mask(70, 150, drop, dtype=torch.float32), dropout_mask(33, 65, drop, dtype=torch.float32)
    assert torch.equal(large[:33, :65], small)


def test_all_64_bits_of_the_seed_matter() -> None:
    masks = [dropout_mask(16, 64, Dropout(0.5, seed(s)), dtype=torch.float32) for s in (1, 2, 1 + 2**40, -1)]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            agree = (one == other).double().mean().item()
            assert 0.4 < agree < 0.6


def test_every_kernel_draws_the_same_mask() -> None:
    """With identities for the matrices each kernel's result is the mask itself."""
    m = k = 48
    ids = torch.arange(m, device=DEVICE) % 3 - 1  # not sorted: kernels see rows in another order
    groups, one = group_rows(ids, 2), torch.eye(k, device=DEVICE)
    drop = Dropout(0.5, seed(11))
    mask = dropout_mask(m, k, drop, dtype=torch.float32)
    routed = mask * (ids >= 0)[:, None]
    ones, eyes = torch.ones(m, k, device=DEVICE), torch.stack([one, one])
    assert torch.equal(shrink_task(ones, eyes, groups, scaling=1.0, dropout=drop), routed)
    dx = dx_task(None, None, ones, eyes, groups, dtype=torch.float32, dropout=drop)
    assert torch.equal(dx, routed)
    # row m of d is the unit vector m, so d^T x is x row by row
    assert torch.equal(da_task(one, ones, groups, 2, dropout=drop, dtype=torch.float32).sum(0), routed)
    dp = torch.cat([one, torch.ones(m, 1, device=DEVICE)], 1)
    da, drouter = da_soft(dp, ones, 1, dropout=drop, dtype=torch.float32)
    assert torch.equal(da[0], mask)
    assert torch.equal(drouter, torch.full_like(drouter, m))
