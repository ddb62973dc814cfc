"""Forward of the layer, first half: the skinny products of x, routed.

Task routing: a program takes positions of `groups.order` and streams x once per task it meets; results of different
tasks never mix, NaN included. Soft routing: all products, the gate and their mixture in one launch; experts beyond
`block_n` columns are taken in chunks, each another pass over x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import Dropout, acc_dtype
from alora_kernels.routing import RowGroups

from .dropout import dropout_keep, dropout_scale, seed_and_p
from .launch import launch
from .numerics import cdiv, common, kernel_scaling, next_power_of_2, power_of_two, rank_block
from .sync import start_dependents
from .tiles import MAX_GATE, stages_for, tile_for


@triton.jit
def next_task(ids, previous, E):
    """The smallest id above `previous` among a block's ids [BLOCK_M], in any order, or E if there is none.

    A block of 64 or 128 rows meets one task, seldom two or three. Each step jumps to the next task that is present, so
    absent tasks cost nothing however many there are. Rows of no task have ids that no step returns: -1, or E and above.

        task = next_task(ids, -1, E)
        while task < E:
            ...                                # rows with ids == task
            task = next_task(ids, task, E)
    """
    return tl.min(tl.where((ids > previous) & (ids < E), ids, E), axis=0)


@triton.jit(do_not_specialize=["M"])
def _shrink_task_kernel(
    x_ptr, a_ptr, h_ptr, ids_ptr, order_ptr, seed_ptr, p_drop, scaling,
    M, K, R, E,
    stride_xm, stride_xk, stride_ae, stride_ar, stride_ak, stride_hm,
    HAS_DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    if PDL:
        start_dependents()
    pos_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = pos_m < M, offs_r < R
    rows = tl.load(order_ptr + pos_m, mask=mask_m, other=0)
    ids = tl.load(ids_ptr + rows, mask=mask_m, other=-1)
    x_rows = x_ptr + rows.to(tl.int64) * stride_xm
    step = tl.full((), BLOCK_K, tl.int64)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    task = next_task(ids, -1, E)
    while task < E:
        a_rows = a_ptr + task.to(tl.int64) * stride_ae + offs_r.to(tl.int64) * stride_ar
        x_ptrs = x_rows[:, None] + offs_k.to(tl.int64)[None, :] * stride_xk
        a_ptrs = a_rows[None, :] + offs_k.to(tl.int64)[:, None] * stride_ak
        part = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_R]
            if EVEN_K:
                x = tl.load(x_ptrs)
                a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0).to(x.dtype)
            else:
                mask_k = offs_k < K - k
                x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
                a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0).to(x.dtype)
            x_ptrs += step * stride_xk
            a_ptrs += step * stride_ak
            if HAS_DROPOUT:
                x = tl.where(dropout_keep(seed, rows, k, p_drop, BLOCK_K), x, 0.0)
            part = tl.dot(x, a, part, input_precision=PRECISION, out_dtype=part.dtype)
        h = tl.where((ids == task)[:, None], part, h)
        task = next_task(ids, task, E)

    h *= tl.cast(scaling, ACC)
    if HAS_DROPOUT:
        h *= dropout_scale(p_drop, ACC)
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * stride_hm + offs_r[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


def shrink_task(x: Tensor, a: Tensor, groups: RowGroups, *, scaling: float, dropout: Dropout | None = None) -> Tensor:
    """Each row through the matrix A of its task: h `[M, R]` in x's dtype.

    Formula: `h_m = s A_{t(m)} dropout(x_m)`, and 0 where row m has no task. s is applied in the accumulator, the
    rounding comes last.
    """
    (m, k), (e, r, _) = x.shape, a.shape
    kernel = "shrink_task_narrow" if dropout is not None or k % 16 else "shrink_task"
    h = torch.empty(m, r, dtype=x.dtype, device=x.device)
    tile, block_r = tile_for(kernel, x.device, x.dtype), rank_block(r, x.dtype)
    # a block should meet one task, not many: with few rows a task, few rows a block
    block_m = power_of_two(min(m, m // e), 16, tile.block_m)
    inside, outside = kernel_scaling(scaling, x.dtype)
    launch(
        _shrink_task_kernel, (cdiv(m, block_m), cdiv(r, block_r)),
        x, a, h, groups.ids, groups.order,
        *seed_and_p(dropout), inside,
        m, k, r, e, *x.stride(), *a.stride(), h.stride(0),
        HAS_DROPOUT=dropout is not None, EVEN_K=k % tile.block_k == 0,
        BLOCK_M=block_m, BLOCK_K=tile.block_k, BLOCK_R=block_r,
        STAGES=stages_for(tile, x.device, dropped=dropout is not None, products=1), **common(tile, x.dtype, x.device),
    )  # fmt: skip
    return h if outside == 1.0 else h.mul_(outside)


@triton.jit
def _soft_products(
    x_rows, stride_xk, a_rows, mask_a, stride_ak, router_rows, mask_e, stride_ok, K, rows, seed_ptr, p_drop,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WITH_A: tl.constexpr, WITH_ROUTER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One pass over x: products dropout(x) a^T [BLOCK_M, W] and logits x router^T [BLOCK_M, E_PAD]."""
    products = tl.zeros((x_rows.shape[0], a_rows.shape[0]), dtype=ACC)
    logits = tl.zeros((x_rows.shape[0], router_rows.shape[0]), dtype=ACC)
    offs_k = tl.arange(0, BLOCK_K)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_rows[:, None] + offs_k.to(tl.int64)[None, :] * stride_xk
    a_ptrs = a_rows[None, :] + offs_k.to(tl.int64)[:, None] * stride_ak
    router_ptrs = router_rows[None, :] + offs_k.to(tl.int64)[:, None] * stride_ok
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = offs_k < K - k
        # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
        x_ptrs += step * stride_xk
        if WITH_ROUTER:
            # [BLOCK_K, E_PAD]
            router = tl.load(router_ptrs, mask=mask_k[:, None] & mask_e[None, :], other=0.0).to(x.dtype)
            router_ptrs += step * stride_ok
            logits = tl.dot(x, router, logits, input_precision=PRECISION, out_dtype=logits.dtype)
        if WITH_A:
            # [BLOCK_K, W]
            a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_a[None, :], other=0.0).to(x.dtype)
            a_ptrs += step * stride_ak
            if HAS_DROPOUT:
                x = tl.where(dropout_keep(seed, rows, k, p_drop, BLOCK_K), x, 0.0)
            products = tl.dot(x, a, products, input_precision=PRECISION, out_dtype=products.dtype)
    return products, logits


@triton.jit
def softmax_rows(logits, mask_e):
    """softmax over the experts that exist [BLOCK_M, E_PAD]; padded ones get 0."""
    logits = tl.where(mask_e[None, :], logits, float("-inf"))
    weight = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weight / tl.sum(weight, axis=1)[:, None]


@triton.jit
def shrink_soft_kernel(
    piece, x_ptr, a_ptr, router_ptr, h_ptr, p_ptr, seed_ptr, p_drop, scaling,
    M, K, R, E,
    stride_xm, stride_xk, stride_ac, stride_ak, stride_oe, stride_ok, stride_hm, stride_pm,
    HAS_DROPOUT: tl.constexpr, ONE_PASS: tl.constexpr, CHUNK: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """p and h of one block of rows and one block of ranks; inside another kernel of row block `piece` and all ranks."""
    if PDL:
        start_dependents()
    if piece is None:
        pid_m, pid_r = tl.program_id(0), tl.program_id(1)
    else:
        pid_m, pid_r = piece, 0
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < M
    x_rows = x_ptr + tl.where(mask_m, rows, 0).to(tl.int64) * stride_xm
    p_rows = p_ptr + rows.to(tl.int64) * stride_pm
    offs_e = tl.arange(0, E_PAD)
    mask_e = offs_e < E
    router_rows = router_ptr + offs_e.to(tl.int64) * stride_oe
    # column c of a chunk is rank r of expert e
    col = tl.arange(0, CHUNK * BLOCK_R)
    offs_r = pid_r * BLOCK_R + col % BLOCK_R
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    gate = tl.zeros((BLOCK_M, E_PAD), dtype=ACC)

    if not ONE_PASS:
        _, logits = _soft_products(
            x_rows, stride_xk, x_rows, mask_m, stride_ak, router_rows, mask_e, stride_ok, K, rows, seed_ptr, p_drop,
            BLOCK_K, STAGES, False, True, False, PRECISION, ACC,
        )  # fmt: skip
        gate = softmax_rows(logits, mask_e)
        tl.store(p_rows[:, None] + (E * R + offs_e)[None, :], logits, mask=mask_m[:, None] & mask_e[None, :])
    for first in range(0, E, CHUNK):
        expert = first + col // BLOCK_R
        mask_a = (expert < E) & (offs_r < R)
        a_rows = a_ptr + (expert * R + offs_r).to(tl.int64) * stride_ac
        products, logits = _soft_products(
            x_rows, stride_xk, a_rows, mask_a, stride_ak, router_rows, mask_e, stride_ok, K, rows, seed_ptr, p_drop,
            BLOCK_K, STAGES, True, ONE_PASS, HAS_DROPOUT, PRECISION, ACC,
        )  # fmt: skip
        if ONE_PASS:
            gate = softmax_rows(logits, mask_e)
            tl.store(p_rows[:, None] + (E * R + offs_e)[None, :], logits, mask=mask_m[:, None] & mask_e[None, :])
        if HAS_DROPOUT:
            products *= dropout_scale(p_drop, ACC)
        tl.store(p_rows[:, None] + (expert * R + offs_r)[None, :], products, mask=mask_m[:, None] & mask_a[None, :])
        # [BLOCK_M, CHUNK]: the gate of this chunk's experts
        index = tl.broadcast_to((first + tl.arange(0, CHUNK))[None, :], (BLOCK_M, CHUNK))
        weight = tl.gather(gate, index, 1)
        # [BLOCK_M, CHUNK, BLOCK_R]
        h += tl.sum(tl.reshape(products, [BLOCK_M, CHUNK, BLOCK_R]) * weight[:, :, None], axis=1)

    h *= tl.cast(scaling, ACC)
    out_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * stride_hm + out_r[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & (out_r < R)[None, :])


def shrink_soft(
    x: Tensor, a: Tensor, router: Tensor, *, scaling: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """h `[M, R]` in x's dtype and the unscaled p `[M, E*R + E]` in the accumulator dtype, in one launch.

    Formula: `p = [dropout(x) a_cat^T | x router^T]`, `gate = softmax(p[:, E*R:])`, `h = s sum_e gate_e p_e`. The router
    sees x before dropout. More than 1024 experts are a ValueError.
    """
    (m, k), (e, r, _) = x.shape, a.shape
    if e > MAX_GATE:
        raise ValueError(f"soft routing supports up to {MAX_GATE} experts, lora_A has {e}")
    kernel = "shrink_soft_narrow" if dropout is not None or k % 16 else "shrink_soft"
    h = torch.empty(m, r, dtype=x.dtype, device=x.device)
    p = torch.empty(m, e * r + e, dtype=acc_dtype(x.dtype), device=x.device)
    tile, block_r, experts = tile_for(kernel, x.device, x.dtype), rank_block(r, x.dtype), next_power_of_2(e)
    chunk = min(experts, max(tile.block_n // block_r, 1))
    block_m = power_of_two(m, 16, tile.block_m if experts <= 64 else 16)  # wide logits: fewer rows, same registers
    inside, outside = kernel_scaling(scaling, x.dtype)
    a_cat = a.reshape(e * r, k)
    launch(
        shrink_soft_kernel, (cdiv(m, block_m), cdiv(r, block_r)),
        None, x, a_cat, router, h, p,
        *seed_and_p(dropout), inside,
        m, k, r, e, *x.stride(), *a_cat.stride(), *router.stride(), h.stride(0), p.stride(0),
        HAS_DROPOUT=dropout is not None, ONE_PASS=chunk == experts, CHUNK=chunk, E_PAD=max(16, experts),
        BLOCK_M=block_m, BLOCK_K=tile.block_k, BLOCK_R=block_r,
        STAGES=stages_for(tile, x.device, dropped=dropout is not None, products=2), **common(tile, x.dtype, x.device),
    )  # fmt: skip
    return (h if outside == 1.0 else h.mul_(outside)), p
