"""Forward of the whole layer in one launch: plan "one_pass", on chips with a copy engine.

Every tile waits for the flag of its row block only before its last step, h b^T. Task routing: the first tile of a row
block, the *leader*, multiplies the rows it streams by their A too. Soft routing: pieces of `shrink_soft` are work of
their own. Both run a group of row blocks ahead of who needs their h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import Dropout, acc_dtype

from .dropout import dropout_keep, dropout_scale, seed_and_p
from .gemm import describable, describe, descriptor_loop, finish_tile
from .launch import launch
from .numerics import cdiv, common, next_power_of_2, power_of_two, rank_block, rank_step, tl_dtype
from .shrink import next_task, shrink_soft_kernel
from .sync import HEADER, ahead_of, clean_up, counters, publish, take_ticket, tickets_of, wait_for
from .tiles import GROUP_M, MAX_RANK_BLOCK, has_tile, persistent_programs, shape_class, stages_for, tile_for

MAX_COLUMNS = 128  # of p in one pass over x, next to the accumulator of a tile


@triton.jit
def _leader_loop(
    acc, x, w, a, row, col, task, rows, seed_ptr, p_drop, K, R,
    WITH_BASE: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One pass over the rows of x: h [BLOCK_M, BLOCK_R] of one task and, WITH_BASE, acc += x w^T."""
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        # [BLOCK_M, BLOCK_K], [BLOCK_R, BLOCK_K]; rows of a beyond its R belong to the next task: never stored
        x_tile = x.load([row, k])
        a_tile = a.load([task * R, k]).to(x_tile.dtype)
        if WITH_BASE:
            # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x_tile, w.load([col, k]).T, acc, input_precision=PRECISION, out_dtype=ACC)
        if HAS_DROPOUT:
            x_tile = tl.where(dropout_keep(seed, rows, k, p_drop, BLOCK_K), x_tile, 0.0)
        h = tl.dot(x_tile, a_tile.T, h, input_precision=PRECISION, out_dtype=ACC)
    return acc, h


@triton.jit(do_not_specialize=["M", "tickets"])
def _one_pass_task_kernel(
    x, w, a, y, bias_ptr, b_ptr, h_ptr, ids_ptr, counters_ptr, seed_ptr, p_drop, scaling,
    M, N, K, R, E,
    tickets,
    stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STEP_R: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    ticket = take_ticket(counters_ptr)
    while ticket < tickets:
        group, index, leads = ahead_of(ticket, GROUP_M, GROUP_M * (num_n - 1))
        pid_m = group * GROUP_M + index % GROUP_M
        pid_n = tl.where(leads, 0, 1 + index // GROUP_M)
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        if row < M:
            offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
            mask_m, mask_n = offs_m < M, offs_n < N
            h_rows = h_ptr + offs_m.to(tl.int64) * R
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
            if leads:
                ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=-1)
                first = next_task(ids, -1, E)
                acc, h = _leader_loop(
                    acc, x, w, a, row, col, first, offs_m, seed_ptr, p_drop, K, R,
                    True, HAS_DROPOUT, BLOCK_M, BLOCK_K, BLOCK_R, STAGES, PRECISION, ACC,
                )  # fmt: skip
                h = tl.where((ids == first)[:, None], h, 0.0)
                task = next_task(ids, first, E)
                while task < E:
                    _, part = _leader_loop(
                        acc, x, w, a, row, col, task, offs_m, seed_ptr, p_drop, K, R,
                        False, HAS_DROPOUT, BLOCK_M, BLOCK_K, BLOCK_R, STAGES, PRECISION, ACC,
                    )  # fmt: skip
                    h = tl.where((ids == task)[:, None], part, h)
                    task = next_task(ids, task, E)
                h *= tl.cast(scaling, ACC)
                if HAS_DROPOUT:
                    h *= dropout_scale(p_drop, ACC)
                tl.store(h_rows[:, None] + offs_r[None, :], h.to(DTYPE), mask=mask_m[:, None] & (offs_r < R)[None, :])
                publish(counters_ptr, pid_m)
            else:
                acc = descriptor_loop(acc, x, w, row, col, K, BLOCK_K, True, PRECISION)
            wait_for(counters_ptr, pid_m, 1)
            finish_tile(
                y, acc, row, col, h_rows, mask_m, b_ptr, bias_ptr, offs_n, mask_n, stride_bn, stride_br, R,
                HAS_BIAS, STEP_R, BLOCK_M, BLOCK_N, PARTS, DTYPE, PRECISION, ACC,
            )  # fmt: skip
        ticket = take_ticket(counters_ptr)
    clean_up(counters_ptr, tl.cdiv(M, BLOCK_M), 1024)


def takes_one_pass_task(x: Tensor, w: Tensor, a: Tensor, dropout: Dropout | None = None) -> bool:
    """Whether `one_pass_task` can run: descriptors reach x, w, a and y, and a rank fits beside a tile."""
    k, n = x.shape[1], w.shape[0]
    most = rank_block(MAX_RANK_BLOCK, x.dtype) if dropout is None else 32  # 64 ranks beside a mask spill 88 bytes
    fits = a.shape[1] <= most and n * x.element_size() % 16 == 0
    # s is applied inside the launch, as float32: not exact enough for float64
    exact = x.dtype != torch.float64 and has_tile("one_pass_task", x.device, x.dtype)
    return fits and exact and a.is_contiguous() and describable(x, w, a.view(-1, k))


def one_pass_task(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole layer under task routing, in one launch: y `[M, N]` and h `[M, R]`, both in x's dtype.

    Formula: `h_m = s A_{t(m)} dropout(x_m)`, `y = x w^T + bias + h b^T`. Rows with an id that names no task get the
    base alone.
    """
    (m, k), n, (e, r, _) = x.shape, w.shape[0], a.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    h = torch.empty(m, r, dtype=x.dtype, device=x.device)
    if m == 0:
        return y, h
    block_r = rank_block(r, x.dtype)
    narrow = dropout is not None or a.dtype != x.dtype
    kernel = "one_pass_task_narrow" if narrow else "one_pass_task"
    tile = tile_for(kernel, x.device, x.dtype, shape_class(m, k, n))
    blocks_m, blocks_n = cdiv(m, tile.block_m), cdiv(n, tile.block_n)
    tickets = tickets_of(cdiv(blocks_m, GROUP_M), GROUP_M, GROUP_M * (blocks_n - 1))
    launch(
        _one_pass_task_kernel, (min(blocks_m * blocks_n, persistent_programs(x.device, tile)),),
        describe(x, (tile.block_m, tile.block_k)), describe(w, (tile.block_n, tile.block_k)),
        describe(a.view(e * r, k), (block_r, tile.block_k)), describe(y, (tile.block_m, tile.block_n // tile.parts)),
        None if bias is None else bias.contiguous(), b, h, ids, counters(x.device, HEADER + blocks_m),
        *seed_and_p(dropout), scaling,
        m, n, k, r, e, tickets, *b.stride(),
        HAS_BIAS=bias is not None, HAS_DROPOUT=dropout is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=block_r,
        STEP_R=rank_step(r, x.dtype, 16 if tile.block_n > 128 else 32), GROUP_M=GROUP_M, PARTS=tile.parts,
        STAGES=stages_for(tile, x.device, dropped=dropout is not None, products=2),
        DTYPE=tl_dtype(x.dtype), **common(tile, x.dtype, x.device),
    )  # fmt: skip
    return y, h


@triton.jit(do_not_specialize=["tickets"])
def _one_pass_soft_kernel(
    x, w, y, x_ptr, a_ptr, router_ptr, bias_ptr, b_ptr, h_ptr, p_ptr, counters_ptr, seed_ptr, p_drop, scaling,
    M, N, K, R, E,
    tickets,
    stride_xm, stride_ac, stride_ak, stride_oe, stride_ok, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, E_PAD: tl.constexpr,
    STEP_R: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    SHARE: tl.constexpr = BLOCK_M // BLOCK_P  # pieces of p per row block
    ticket = take_ticket(counters_ptr)
    while ticket < tickets:
        group, index, produces = ahead_of(ticket, GROUP_M * SHARE, GROUP_M * tl.cdiv(N, BLOCK_N))
        if produces:
            piece = group * (GROUP_M * SHARE) + index
            if piece * BLOCK_P < M:
                shrink_soft_kernel(
                    piece, x_ptr, a_ptr, router_ptr, h_ptr, p_ptr, seed_ptr, p_drop, scaling, M, K, R, E,
                    stride_xm, 1, stride_ac, stride_ak, stride_oe, stride_ok, R, E * R + E,
                    HAS_DROPOUT, True, CHUNK, E_PAD, BLOCK_P, BLOCK_K, BLOCK_R, STAGES, PRECISION, ACC,
                )  # fmt: skip
                publish(counters_ptr, piece // SHARE)
        else:
            pid_m = group * GROUP_M + index % GROUP_M
            row, col = pid_m * BLOCK_M, (index // GROUP_M) * BLOCK_N
            if row < M:
                offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
                acc = descriptor_loop(acc, x, w, row, col, K, BLOCK_K, True, PRECISION)
                wait_for(counters_ptr, pid_m, tl.minimum(SHARE, tl.cdiv(M - row, BLOCK_P)))
                finish_tile(
                    y, acc, row, col, h_ptr + offs_m.to(tl.int64) * R, offs_m < M, b_ptr, bias_ptr, offs_n, offs_n < N,
                    stride_bn, stride_br, R, HAS_BIAS, STEP_R, BLOCK_M, BLOCK_N, PARTS, DTYPE, PRECISION, ACC,
                )  # fmt: skip
        ticket = take_ticket(counters_ptr)
    clean_up(counters_ptr, tl.cdiv(M, BLOCK_M), 1024)


def takes_one_pass_soft(x: Tensor, w: Tensor, a: Tensor) -> bool:
    """Whether `one_pass_soft` can run: descriptors reach x, w and y, all experts fit in one pass over x."""
    (e, r, _), n = a.shape, w.shape[0]
    columns = next_power_of_2(e) * rank_block(r, x.dtype)
    fits = r <= rank_block(MAX_RANK_BLOCK, x.dtype) and columns <= MAX_COLUMNS and n * x.element_size() % 16 == 0
    # s is applied inside the launch, as float32: not exact enough for float64
    exact = x.dtype != torch.float64 and has_tile("one_pass_soft", x.device, x.dtype)
    return fits and exact and describable(x, w)


def one_pass_soft(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole layer under soft routing, in one launch: y, h and p as in `expand` and `shrink_soft`.

    Formula: `p = [dropout(x) a_cat^T | x router^T]`, `h = s sum_e softmax(logits)_e p_e`, `y = x w^T + bias + h b^T`.
    """
    (m, k), n, (e, r, _) = x.shape, w.shape[0], a.shape
    y, h = torch.empty(m, n, dtype=x.dtype, device=x.device), torch.empty(m, r, dtype=x.dtype, device=x.device)
    p = torch.empty(m, e * r + e, dtype=acc_dtype(x.dtype), device=x.device)
    if m == 0:
        return y, h, p
    block_r, experts, a_cat = rank_block(r, x.dtype), next_power_of_2(e), a.reshape(e * r, k)
    # 16 columns of p beside 256 of y spill 40 bytes, 128 columns do not
    narrow = dropout is not None or a.dtype != x.dtype or experts * block_r <= 16
    kernel = "one_pass_soft_narrow" if narrow else "one_pass_soft"
    tile = tile_for(kernel, x.device, x.dtype, shape_class(m, k, n))
    block_p = power_of_two(tile.block_m // 2, 16, 64)
    blocks_m, blocks_n = cdiv(m, tile.block_m), cdiv(n, tile.block_n)
    share = tile.block_m // block_p
    tickets = tickets_of(cdiv(blocks_m, GROUP_M), GROUP_M * share, GROUP_M * blocks_n)
    launch(
        _one_pass_soft_kernel, (min(blocks_m * (blocks_n + share), persistent_programs(x.device, tile)),),
        describe(x, (tile.block_m, tile.block_k)), describe(w, (tile.block_n, tile.block_k)),
        describe(y, (tile.block_m, tile.block_n // tile.parts)),
        x, a_cat, router, None if bias is None else bias.contiguous(), b, h, p, counters(x.device, HEADER + blocks_m),
        *seed_and_p(dropout), scaling,
        m, n, k, r, e, tickets, x.stride(0), *a_cat.stride(), *router.stride(), *b.stride(),
        HAS_BIAS=bias is not None, HAS_DROPOUT=dropout is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_P=block_p, BLOCK_R=block_r,
        CHUNK=experts, E_PAD=max(16, experts), STEP_R=rank_step(r, x.dtype, 16 if tile.block_n > 128 else 32),
        GROUP_M=GROUP_M, PARTS=tile.parts,
        STAGES=stages_for(tile, x.device, dropped=dropout is not None, products=2),
        DTYPE=tl_dtype(x.dtype), **common(tile, x.dtype, x.device),
    )  # fmt: skip
    return y, h, p
