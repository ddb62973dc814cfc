"""The layers whose kernels are compiled and counted: routings, types, shapes and flags.

A kernel flag or tile that no case reaches is never compiled before it runs on somebody's GPU, so a new kernel comes
with cases here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from alora_kernels import kernels as ak
from alora_kernels.ops import experts
from alora_kernels.routing import RowGroups


@dataclass(frozen=True)
class Case:
    """One layer whose forward and backward are recorded; letters as everywhere in the package."""

    routing: str
    dtype: torch.dtype
    m: int = 8192
    k: int = 4096
    n: int = 4096
    r: int = 16
    e: int = 8
    dropout: bool = False
    bias: bool = False
    base: bool = True
    adapter: torch.dtype | None = None  # None: like dtype
    transposed: bool = False  # w is stored [K, N], which descriptors do not take
    precision: str = "ieee"  # of float32 products: `torch.backends.cuda.matmul.fp32_precision`


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    [
        Case(routing, dtype, dropout=dropout, bias=not dropout)
        for routing in ("task", "soft")
        for dtype in (_BF16, _FP32)
        for dropout in (False, True)
    ]
    + [
        case
        for routing in ("task", "soft")
        for case in (
            Case(routing, _FP16, dropout=True),
            Case(routing, _BF16, r=8, e=1),
            Case(routing, _BF16, r=33, dropout=True),
            Case(routing, _BF16, r=64, dropout=True),
            Case(routing, _BF16, r=64, adapter=_FP32),
            Case(routing, _BF16, r=16, adapter=_FP32, dropout=True),
            Case(routing, _BF16, base=False),
            Case(routing, _BF16, bias=True, transposed=True),
            Case(routing, _BF16, dropout=True, transposed=True),
            Case(routing, _BF16, r=64, adapter=_FP32, transposed=True),
            Case(routing, _FP32, transposed=True),
            Case(routing, _BF16, k=14336),
            Case(routing, _BF16, r=32, e=4),
            Case(routing, _BF16, r=64, e=2),
            Case(routing, _BF16, m=64, e=64),
            Case(routing, _BF16, base=False, dropout=True),
            Case(routing, _BF16, m=16, n=4000),
            Case(routing, _BF16, m=48, dropout=True),
            Case(routing, _BF16, k=1000, n=1001),
            Case(routing, _FP32, r=64, e=1),
            Case(routing, _FP32, r=64, e=8, dropout=True),
            Case(routing, _FP32, m=48),
            Case(routing, _FP32, precision="tf32"),
            Case(routing, _FP32, precision="tf32", dropout=True, r=64),
        )
    ]
    + [Case("soft", _BF16, e=64), Case("soft", _BF16, r=64, e=64, adapter=_FP32, dropout=True)]
    + [  # e experts, rows sorted by them: Qwen3-30B-A3B, Mixtral 8x7B, GPT-OSS 20B
        case
        for adapter in (_BF16, _FP32)
        for case in (
            Case("experts", _BF16, m=65536, k=2048, n=1536, e=128, adapter=adapter),
            Case("experts", _BF16, m=512, k=2048, n=1536, e=128, adapter=adapter),
            Case("experts", _BF16, m=16384, n=28672, adapter=adapter),
            Case("experts", _BF16, m=32768, k=2880, n=5760, r=8, e=32, bias=True, adapter=adapter),
            Case("experts", _BF16, m=32768, k=2880, n=2880, r=64, e=32, bias=True, adapter=adapter),
        )
    ]
)


def run_case(case: Case) -> None:
    """Call every launcher of one forward and backward that takes this layer on the recorded chip, on meta tensors."""

    def empty(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or case.dtype, device="meta")

    adapter = case.adapter or case.dtype
    if case.routing == "experts":
        return _run_experts(case, empty, empty(case.e, case.n, case.r, dtype=adapter))
    x, dy = empty(case.m, case.k), empty(case.m, case.n)
    w = empty(case.k, case.n).t() if case.transposed else empty(case.n, case.k)
    a, b = empty(case.e, case.r, case.k, dtype=adapter), empty(case.n, case.r, dtype=adapter)
    router, bias = empty(case.e, case.k, dtype=adapter), empty(case.n) if case.bias else None
    drop = ak.Dropout(0.1, empty(1, dtype=torch.int64)) if case.dropout else None
    base_dy, base_w = (dy, w) if case.base else (None, None)
    ids, offsets = empty(case.m, dtype=torch.int32), empty(case.e + 1, dtype=torch.int32)
    groups = RowGroups(ids, ids, offsets)
    for overlap in (False, *([True] if case.base and ak.overlaps_launches(x.device) else [])):
        with ak.overlapping() if overlap else nullcontext():
            if case.routing == "task":
                h = ak.shrink_task(x, a, groups, scaling=2.0, dropout=drop)
            else:
                h, p = ak.shrink_soft(x, a, router, scaling=2.0, dropout=drop)
            if case.base:
                ak.expand(x, w, bias, h, b)
    if case.base:
        if case.routing == "soft" and ak.takes_one_pass_soft(x, w, a):
            ak.one_pass_soft(x, w, bias, a, b, router, scaling=2.0, dropout=drop)
        if case.routing == "task" and ak.takes_one_pass_task(x, w, a, drop):
            ak.one_pass_task(x, w, bias, a, b, ids, scaling=2.0, dropout=drop)
        if case.routing == "task" and drop is None and ak.takes_decode(x, a):
            ak.decode(x, w, bias, a, b, ids, scaling=2.0)
    dh, _ = ak.expand_backward(dy, b, h, scaling=2.0)
    if case.routing == "task":
        ak.dx_task(base_dy, base_w, dh, a, groups, dtype=case.dtype, dropout=drop)
        ak.da_task(dh, x, groups, case.e, dropout=drop, dtype=adapter)
    else:
        dp = ak.gate_backward(dh, p, case.e, dtype=case.dtype)
        ak.dx_soft(base_dy, base_w, dp, a, router, dtype=case.dtype, dropout=drop)
        ak.da_soft(dp, x, case.e, dropout=drop, dtype=adapter)
    if drop is not None:
        ak.dropout_mask(case.m, case.k, drop, dtype=torch.float32)


def _run_experts(case: Case, empty: Callable[..., Tensor], b: Tensor) -> None:
    """The half of an adapted stacked weight that has kernels of its own variants; its shrink is that of a layer."""
    w, h, bias = empty(case.e, case.n, case.k), empty(case.m, case.r), empty(case.e, case.n) if case.bias else None
    rows = empty(case.m, dtype=torch.int32), empty(case.e + 1, dtype=torch.int32)
    experts.grouped(empty(case.m, case.k), w, bias, h, b, *rows)
    experts.grouped_backward(empty(case.m, case.n), w, h, b, *rows, [True] * 3)
