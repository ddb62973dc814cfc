"""Backward of the mixture and the softmax gate: dp from dh, between `expand_backward` and `dx_soft` / `da_soft`.

Element-wise over rows. The gate is recomputed from the logits, which is cheaper than storing it. Two short walks over
the rank: the first makes dgate (every expert of a row at once), the second writes dp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import acc_dtype

from .launch import launch
from .numerics import cdiv, next_power_of_2, power_of_two, tl_dtype
from .shrink import softmax_rows
from .tiles import MAX_GATE

_ELEMENTS = 4096  # of one [rows, experts, ranks] tile: 32 registers a thread in four warps


@triton.jit
def _gate_backward_kernel(
    dh_ptr, p_ptr, dp_ptr,
    M, R, E,
    stride_dhm, stride_dhr, stride_pm, stride_dpm,
    BLOCK_M: tl.constexpr, E_PAD: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_e = tl.arange(0, E_PAD)
    mask_m, mask_e = offs_m < M, offs_e < E
    rows = offs_m.to(tl.int64)
    mask_me = mask_m[:, None] & mask_e[None, :]
    logit_col = (E * R + offs_e)[None, :]
    # [BLOCK_M, E_PAD]
    gate = softmax_rows(tl.load(p_ptr + rows[:, None] * stride_pm + logit_col, mask=mask_me, other=0.0), mask_e)

    dgate = tl.zeros((BLOCK_M, E_PAD), dtype=ACC)
    for first in range(0, R, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        # [BLOCK_M, BLOCK_R], [BLOCK_M, E_PAD, BLOCK_R]
        dh_ptrs = dh_ptr + rows[:, None] * stride_dhm + offs_r.to(tl.int64)[None, :] * stride_dhr
        dh = tl.load(dh_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        p_cols = offs_e[:, None] * R + offs_r[None, :]
        p_ptrs = p_ptr + rows[:, None, None] * stride_pm + p_cols[None, :, :]
        p = tl.load(p_ptrs, mask=mask_me[:, :, None] & mask_r[None, None, :], other=0.0)
        dgate += tl.sum(p * dh[:, None, :], axis=2)
    dlogits = gate * (dgate - tl.sum(gate * dgate, axis=1)[:, None])
    dlogit_ptrs = dp_ptr + rows[:, None] * stride_dpm + logit_col
    tl.store(dlogit_ptrs, dlogits.to(dp_ptr.dtype.element_ty), mask=mask_me)

    for first in range(0, R, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        # [BLOCK_M, BLOCK_R], [BLOCK_M, E_PAD, BLOCK_R]
        dh_ptrs = dh_ptr + rows[:, None] * stride_dhm + offs_r.to(tl.int64)[None, :] * stride_dhr
        dh = tl.load(dh_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        dp = gate[:, :, None] * dh[:, None, :]
        p_cols = offs_e[:, None] * R + offs_r[None, :]
        dp_ptrs = dp_ptr + rows[:, None, None] * stride_dpm + p_cols[None, :, :]
        tl.store(dp_ptrs, dp.to(dp_ptr.dtype.element_ty), mask=mask_me[:, :, None] & mask_r[None, None, :])


def gate_backward(dh: Tensor, p: Tensor, num_experts: int, *, dtype: torch.dtype) -> Tensor:
    """dp `[M, E*R + E]` in `dtype`, that of x, since products with x come next; a ValueError above 1024 experts.

    Formula: `dgate_e = <dh, p_e>`, `dlogits = gate (dgate - sum_e gate_e dgate_e)`, `dp = [gate_e dh | dlogits]`.
    """
    (m, r), experts = dh.shape, next_power_of_2(num_experts)
    if num_experts > MAX_GATE:
        raise ValueError(f"soft routing supports up to {MAX_GATE} experts, got {num_experts}")
    dp = torch.empty(m, num_experts * r + num_experts, dtype=dtype, device=dh.device)
    block_r = power_of_two(r, 1, _ELEMENTS // experts)
    block_m = power_of_two(m, 1, min(64, _ELEMENTS // (experts * block_r)))
    launch(
        _gate_backward_kernel, (cdiv(m, block_m),),
        dh, p, dp, m, r, num_experts, *dh.stride(), p.stride(0), dp.stride(0),
        BLOCK_M=block_m, E_PAD=experts, BLOCK_R=block_r, ACC=tl_dtype(acc_dtype(p.dtype)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return dp
