"""The alternatives compute the same function; otherwise a comparison of their speeds means nothing."""

from __future__ import annotations

import pytest
import torch

from alora_kernels import reference
from alora_kernels.baselines.layers import authors_loop
from bench.layers import formulas
from tests.compare import assert_as_good_as_torch, problem


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("layer", [authors_loop, formulas.hoisted], ids=lambda f: f.__name__)
def test_they_equal_the_reference(layer, routing):
    p = problem((3, 6), 10, 8, 4, 3, routing=routing, dtype=torch.float32)
    assert_as_good_as_torch(p, layer, torch.float32)


def test_grouped_by_task_equals_the_reference():
    p = problem((6, 5), 10, 8, 4, 3, routing="task", dtype=torch.float32, ids=torch.tensor([2, 0, -1, 2, 1, 0]))
    assert_as_good_as_torch(p, formulas.grouped_by_task, torch.float32)


def test_the_reference_is_the_sum_written_out():
    p = problem((5,), 6, 4, 2, 3, routing="soft", dtype=torch.float64)
    x, a, b, router, bias = (p.leaves[k] for k in ("x", "a", "b", "router", "bias"))
    gate = torch.softmax(x @ router.t(), -1)
    for m in range(5):
        mixed = sum(gate[m, e] * (a[e] @ x[m]) for e in range(3))
        row = p.weight @ x[m] + bias + 0.75 * b @ mixed
        torch.testing.assert_close(
            reference.alora_linear(x, p.weight, a, b, bias=bias, router=router, scaling=0.75)[m], row
        )
