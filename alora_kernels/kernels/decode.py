"""Decoding: forward of the whole layer in one launch for few rows of many tasks, under the plan "one_pass".

The first pieces of work are one row and one slice of K each, multiplied in registers: 64 A of rank 16 are a quarter of
a 4096x4096 w, so both are read at once. The others are tiles of the GEMM, which wait for the planes before their last
step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import acc_dtype

from .gemm import gemm_loop
from .launch import launch
from .numerics import cdiv, common, power_of_two, rank_block, tl_dtype
from .sync import HEADER, clean_up, counters, orders_stores, publish, take_ticket, wait_for
from .tiles import DECODE_ROWS, tile_for

SLICE = 1024  # of K in one piece: 32 KiB of a rank-16 A in bf16


@triton.jit
def _row_shrink(
    m, first, last, x_ptr, a_ptr, plane_ptr, ids_ptr, R, E, stride_xm, stride_xk, stride_ae, stride_ar, stride_ak,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row's product with the A of its task over columns first .. last, stored to `plane_ptr` [R]."""
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    task = tl.load(ids_ptr + m)
    limit = tl.where((task >= 0) & (task < E), last, first)  # no columns at all for a row of no task
    x_row = x_ptr + m.to(tl.int64) * stride_xm
    a_rows = a_ptr + task.to(tl.int64) * stride_ae + offs_r.to(tl.int64)[:, None] * stride_ar
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=ACC)
    for k in range(first, last, BLOCK_K):
        cols = k + offs_k
        mask_k = cols < limit
        # [BLOCK_K], [BLOCK_R, BLOCK_K]; a is rounded to x's dtype as in every other kernel
        x = tl.load(x_row + cols.to(tl.int64) * stride_xk, mask=mask_k, other=0.0)
        a_ptrs = a_rows + cols.to(tl.int64)[None, :] * stride_ak
        a = tl.load(a_ptrs, mask=mask_k[None, :] & (offs_r < R)[:, None], other=0.0)
        total += x.to(ACC)[None, :] * a.to(x.dtype).to(ACC)
    tl.store(plane_ptr + offs_r, tl.sum(total, axis=1), mask=offs_r < R)


@triton.jit(do_not_specialize=["M", "slices", "tickets"])
def _decode_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, y_ptr, h_ptr, planes_ptr, ids_ptr, counters_ptr, scaling,
    M, N, K, R, E,
    slices, tickets,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ae, stride_ar, stride_ak, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SLICE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    ticket = take_ticket(counters_ptr)
    pieces = M * slices
    if ticket < pieces:
        m, part = ticket % M, ticket // M
        # planes [slices, M, R]
        plane_ptr = planes_ptr + (part * M + m) * R
        _row_shrink(
            m, part * SLICE, tl.minimum(part * SLICE + SLICE, K), x_ptr, a_ptr, plane_ptr, ids_ptr, R, E,
            stride_xm, stride_xk, stride_ae, stride_ar, stride_ak, BLOCK_A, BLOCK_R, ACC,
        )  # fmt: skip
        publish(counters_ptr, 0)
    elif ticket < tickets:
        pid_n = ticket - pieces
        offs_m, offs_n, offs_r = tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
        rows, cols = tl.where(mask_m, offs_m, 0).to(tl.int64), offs_n.to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        acc = gemm_loop(
            acc, x_ptr + rows * stride_xm, stride_xk, w_ptr + cols * stride_wn, mask_n, stride_wk, K,
            EVEN_N, EVEN_K, BLOCK_K, PRECISION,
        )  # fmt: skip
        wait_for(counters_ptr, 0, pieces)
        # [BLOCK_M, BLOCK_R]
        mask_h, h_offs = mask_m[:, None] & mask_r[None, :], offs_m[:, None] * R + offs_r[None, :]
        h = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
        for part in range(0, slices):
            h += tl.load(planes_ptr + part * M * R + h_offs, mask=mask_h, other=0.0)
        h = (h * tl.cast(scaling, ACC)).to(DTYPE)
        if pid_n == 0:
            tl.store(h_ptr + h_offs, h, mask=mask_h)
        # [BLOCK_R, BLOCK_N]
        b_ptrs = b_ptr + cols[None, :] * stride_bn + offs_r.to(tl.int64)[:, None] * stride_br
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
        acc = tl.dot(h, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if HAS_BIAS:
            # [BLOCK_N]
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        tl.store(y_ptr + rows[:, None] * N + cols[None, :], acc.to(DTYPE), mask=mask_m[:, None] & mask_n[None, :])
    clean_up(counters_ptr, 1, 16)


def takes_decode(x: Tensor, a: Tensor) -> bool:
    """Whether `decode` can run: few rows, a rank that one step holds, s exact as float32, flags that may be trusted."""
    fits = 0 < x.shape[0] <= DECODE_ROWS and a.shape[1] <= rank_block(a.shape[1], x.dtype)
    return fits and x.dtype != torch.float64 and orders_stores(x.device)


def decode(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, ids: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """The whole layer for at most 64 rows of any tasks, in one launch: y `[M, N]` and h `[M, R]`, both in x's dtype.

    Formula: `h_m = s A_{t(m)} x_m`, `y = x w^T + bias + h b^T`. Rows with an id that names no task get the base alone.
    """
    (m, k), n, (e, r, _) = x.shape, w.shape[0], a.shape
    y, h = torch.empty(m, n, dtype=x.dtype, device=x.device), torch.empty(m, r, dtype=x.dtype, device=x.device)
    tile, block_r = tile_for("decode", x.device, x.dtype), rank_block(r, x.dtype)
    span = min(SLICE, tile.block_k * 8)
    slices = cdiv(k, span)
    planes = torch.empty(slices, m, r, dtype=acc_dtype(x.dtype), device=x.device)
    tickets = m * slices + cdiv(n, tile.block_n)
    launch(
        _decode_kernel, (tickets,),
        x, w, None if bias is None else bias.contiguous(), a, b, y, h, planes, ids, counters(x.device, HEADER + 1),
        scaling, m, n, k, r, e, slices, tickets, *x.stride(), *w.stride(), *a.stride(), *b.stride(),
        HAS_BIAS=bias is not None, EVEN_N=n % tile.block_n == 0, EVEN_K=k % tile.block_k == 0,
        SLICE=span, BLOCK_M=power_of_two(m, 16, DECODE_ROWS), BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        # the elements of A that one step multiplies: 32 registers a thread in four warps
        BLOCK_A=min(span, max(16, 4096 // block_r)), BLOCK_R=block_r,
        DTYPE=tl_dtype(x.dtype), **common(tile, x.dtype, x.device),
    )  # fmt: skip
    return y, h
