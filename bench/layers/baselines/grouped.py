"""Ordinary multi-LoRA on `torch.nn.functional.grouped_mm`: every task has its own A and its own B.

In:   x, the frozen weight, a `[E, R, K]`, bs `[E, N, R]`, rows sorted by task.
Out:  y_t = x_t w^T + s x_t a_t^T b_t^T.
Who:  `bench.layers.providers` under the name "grouped_mm multi-LoRA".

What a good engineer writes today for mixed tasks without the shared B. The sort and the group bounds are made once,
outside of what is timed, as a batch makes them once for all layers; rows that lie sorted are not gathered.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layer import Layer, over
from ..problem import Case, Problem


def missing(case: Case) -> str | None:
    """`grouped_mm` on CUDA takes bf16 only, and float64 nowhere."""
    if case.device != "cpu" and case.dtype != torch.bfloat16:
        return "grouped_mm takes bf16 on CUDA devices"
    return None


def build(problem: Problem) -> Layer:
    """Two grouped products around the base product."""
    c = problem.case
    ids = problem.ids.repeat_interleave(c.m // c.batch)
    order = torch.argsort(ids, stable=True)
    ends = torch.bincount(ids, minlength=c.e).cumsum(0).to(torch.int32)
    is_sorted = bool((ids[1:] >= ids[:-1]).all())
    inverse = torch.argsort(order)
    w = problem.given.weight

    def forward(x: Tensor, a: Tensor, bs: Tensor) -> Tensor:
        rows = x.view(-1, c.k) if is_sorted else x.view(-1, c.k)[order]
        h = F.grouped_mm(rows, a.to(x.dtype).transpose(1, 2), offs=ends) * problem.scaling
        low = F.grouped_mm(h, bs.to(x.dtype).transpose(1, 2), offs=ends)
        return F.linear(x, w) + (low if is_sorted else low[inverse]).view(c.batch, -1, c.n)

    return over(problem, "multi", forward)
