"""The smallest kernel with descriptors made on the host, for chips of each kind; `report` runs in its own process."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from alora_kernels.kernels import Launch
from bench.static.aot import compile_chunk, compile_job, to_job
from bench.static.cubin import CHIPS, count_codes

NAMES = ("sm_80", "sm_90", "sm_100", "gfx942")  # with a copy engine and without, tensor memory, AMD


@triton.jit
def _descriptor_kernel(x, w, y, bias_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(x.load([row, k]), w.load([col, k]).T, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col + tl.arange(0, BLOCK_N))[None, :]
    y.store([row, col], acc.to(y.dtype))


def launch(bias: bool, k: int, block_k: int) -> Launch:
    """A launch as a launcher would record it: meta tensors, described on the host."""

    def described(rows: int, cols: int, *tile: int) -> TensorDescriptor:
        t = torch.empty(rows, cols, dtype=torch.bfloat16, device="meta")
        return TensorDescriptor(t, list(t.shape), list(t.stride()), list(tile))

    args = (
        described(1024, k, 128, block_k),
        described(2048, k, 128, block_k),
        described(1024, 2048, 128, 128),
        torch.empty(2048, device="meta") if bias else None,
        k,
    )
    meta = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=block_k, num_warps=8, num_stages=3)
    return Launch(_descriptor_kernel, (8, 16), args, meta)


def report() -> None:
    """Print, per chip, jobs and rows of two variants, and instruction counts one by one, as JSON."""
    found: dict[str, Any] = {}
    for name in NAMES:
        chip = CHIPS[name]
        jobs = [to_job(name, launch(True, 512, 64)), to_job(name, launch(False, 1000, 32))]
        codes = [compile_job(job)[1] for job in jobs]
        alone = [asdict(count_codes([code], chip.image)[0]) for code in codes if isinstance(code, bytes)]
        rows = [asdict(row) for row in compile_chunk(jobs)]
        found[name] = {"jobs": [asdict(job) for job in jobs], "rows": rows, "alone": alone}
    print(json.dumps(found))
