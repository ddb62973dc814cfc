"""What every GEMM of this package shares: the tile, the operands, the loops over K (or N) and over the rank.

Through pointers, rows are not masked (the caller clamps their numbers), columns and the contraction are, unless the
tile divides them. Descriptors need no masks. Chips without a copy engine use pointers: there Triton turns a descriptor
into masked loads that are not pipelined (640 bytes spilled a thread on sm_80).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .numerics import power_of_two
from .tiles import Tile, has_copy_engine, shape_class, tile_for


def describable(*matrices: Tensor) -> bool:
    """Whether every matrix can be reached through a descriptor on its device."""
    return has_copy_engine(matrices[0].device) and all(map(_describable, matrices))


def _describable(t: Tensor) -> bool:
    if t.dim() != 2:
        return False
    row, one = t.stride()
    aligned = one == 1 and row * t.element_size() % 16 == 0 and row >= t.shape[1]
    return aligned and (t.is_meta or t.data_ptr() % 16 == 0)


def describe(matrix: Tensor, tile: Sequence[int]) -> TensorDescriptor:
    """A descriptor of the matrix in tiles of this shape.

    Its constructor would check again what `describable` has: six times a layer, a sixth of its host time.
    """
    made = object.__new__(TensorDescriptor)
    made.base, made.block_shape = matrix, list(tile)
    made.shape, made.strides = list(matrix.shape), list(matrix.stride())
    return made


class Operands(NamedTuple):
    """The base product `left [M, L] right -> [M, C]` as a kernel takes it."""

    left: Any  # a tensor, or a descriptor of it, as right and out
    right: Any
    out: Any
    strides: tuple[int, ...]  # of left, then of right; zeros without a base product
    tile: Tile  # block_n counts columns of the result, block_k steps of the contraction
    block_m: int  # rows of a tile; fewer than the tile's when the batch is small
    flags: dict[str, bool | int]  # the kernel's constexprs about the operands


def gemm_tile(
    rows: int, cols: int, depth: int, device: torch.device, dtype: torch.dtype, *, masks: bool, descriptors: bool
) -> tuple[Tile, int]:
    """The tile of the base GEMM `[rows, depth] [depth, cols]`, and its rows.

    `masks`: the kernel also draws a dropout mask; `descriptors`: the operands come through descriptors.
    """
    small = tile_for("gemm_small", device, dtype)
    if rows <= small.block_m and not descriptors:
        return small, power_of_two(rows, 16, small.block_m)
    shapes = shape_class(rows, depth, cols)
    if descriptors:
        tile = tile_for("gemm_descriptor_narrow" if masks else "gemm_descriptor", device, dtype, shapes)
        return tile, tile.block_m
    tile = tile_for("gemm", device, dtype, shapes)
    if cols % 16 or depth % 16:  # rows that are not aligned are loaded element by element: many addresses
        tile = tile_for("gemm_ragged", device, dtype)
    elif masks or cols % tile.block_n or depth % tile.block_k or not depth:  # masks and philox need registers
        tile = tile_for("gemm_narrow", device, dtype)
    return tile, tile.block_m


def operands(left: Tensor | None, right: Tensor | None, out: Tensor, *, transposed: bool, masks: bool) -> Operands:
    """How to reach the operands of the base product, chosen by chip, size and alignment.

    left is `[M, L]`, out `[M, C]`, right `[L, C]` or, if transposed, `[C, L]`: forward multiplies by w^T, backward by
    w. Without a base product left and right are both None; one alone is a ValueError. `masks` as in `gemm_tile`.
    """
    if (left is None) != (right is None):
        raise ValueError("give both dy and w, or neither")
    depth = 0 if left is None else left.shape[1]
    small = out.shape[0] <= tile_for("gemm_small", out.device, out.dtype).block_m
    through = left is not None and right is not None and not small and describable(left, right, out)
    tile, block_m = gemm_tile(*out.shape, depth, out.device, out.dtype, masks=masks, descriptors=through)
    if not through:
        strides = (0, 0, 0, 0) if left is None or right is None else (*left.stride(), *right.stride())
        even = {"EVEN_COLS": out.shape[1] % tile.block_n == 0, "EVEN_DEPTH": depth % tile.block_k == 0}
        return Operands(left, right, out, strides, tile, block_m, {"DESCRIPTORS": False, "PARTS": 1, **even})
    steps = (tile.block_n, tile.block_k) if transposed else (tile.block_k, tile.block_n)
    described = (
        describe(left, (block_m, tile.block_k)),
        describe(right, steps),
        describe(out, (block_m, tile.block_n // tile.parts)),
    )
    flags = {"DESCRIPTORS": True, "PARTS": tile.parts, "EVEN_COLS": True, "EVEN_DEPTH": True}
    return Operands(*described, (0, 0, 0, 0), tile, block_m, flags)


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile coordinates of a program: columns of GROUP_M row blocks, so that neighbours share weights in L2."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    size = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % size, (pid % width) // size


@triton.jit
def gemm_loop(
    acc, in_rows, stride_ik, w_cols, mask_n, stride_wk, K,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] += in [BLOCK_M, K] w [K, BLOCK_N], through pointers."""
    offs_k = tl.arange(0, BLOCK_K)
    in_ptrs = in_rows[:, None] + offs_k.to(tl.int64)[None, :] * stride_ik
    w_ptrs = w_cols[None, :] + offs_k.to(tl.int64)[:, None] * stride_wk
    step = tl.full((), BLOCK_K, tl.int64)
    for k in range(0, K, BLOCK_K):
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        if EVEN_K:
            left = tl.load(in_ptrs)
        else:
            left = tl.load(in_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            right = tl.load(w_ptrs)
        else:
            right = tl.load(w_ptrs, mask=(offs_k < K - k)[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        in_ptrs += step * stride_ik
        w_ptrs += step * stride_wk
    return acc


@triton.jit
def rank_loop(
    acc, in_rows, mask_m, stride_ir, w_cols, mask_n, stride_wr, R,
    BLOCK_R: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] += in [BLOCK_M, R] w [R, BLOCK_N], both rounded to DTYPE; masked rows add zero."""
    # One stage: the loop turns once to four times; pipelined, float32 adapters next to 128x256 spill 96 bytes.
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        # [BLOCK_M, BLOCK_R], [BLOCK_R, BLOCK_N]
        in_ptrs = in_rows[:, None] + offs_r.to(tl.int64)[None, :] * stride_ir
        w_ptrs = w_cols[None, :] + offs_r.to(tl.int64)[:, None] * stride_wr
        left = tl.load(in_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(DTYPE)
        right = tl.load(w_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def descriptor_loop(
    acc, left, right, row, col, LENGTH,
    BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] += left [rows, LENGTH] right, right [LENGTH, cols] or, TRANSPOSED, [cols, LENGTH]."""
    for k in range(0, LENGTH, BLOCK):
        # [BLOCK_M, BLOCK]
        l_tile = left.load([row, k])
        if TRANSPOSED:
            r_tile = right.load([col, k]).T
        else:
            r_tile = right.load([k, col])
        acc = tl.dot(l_tile, r_tile.to(l_tile.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def store_tile(y, row, col, acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Store acc [BLOCK_M, BLOCK_N] through a descriptor of tiles [BLOCK_M, BLOCK_N / PARTS].

    In two parts it needs half the shared memory, which buys a stage of the pipeline.
    """
    if PARTS == 2:
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        y.store([row, col], left.to(y.dtype))
        y.store([row, col + BLOCK_N // 2], right.to(y.dtype))
    else:
        y.store([row, col], acc.to(y.dtype))


@triton.jit
def base_product(
    acc, left, right, row, col, rows, offs_c, mask_c, stride_lm, stride_ll, stride_rl, stride_rc, LENGTH,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_COLS: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    BLOCK_L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_C] += left [M, LENGTH] right [LENGTH, C], as `operands` prepared the matrices."""
    # [BLOCK_M, LENGTH] [LENGTH, BLOCK_C]
    if DESCRIPTORS:
        return descriptor_loop(acc, left, right, row, col, LENGTH, BLOCK_L, TRANSPOSED, PRECISION)
    else:
        return gemm_loop(
            acc, left + rows * stride_lm, stride_ll, right + offs_c.to(tl.int64) * stride_rc, mask_c, stride_rl, LENGTH,
            EVEN_COLS, EVEN_DEPTH, BLOCK_L, PRECISION,
        )  # fmt: skip


@triton.jit
def finish_gemm(
    out, acc, left, right, bias_ptr, row, col, rows, offs_c, mask_m, mask_c,
    stride_lm, stride_ll, stride_rl, stride_rc, stride_om, LENGTH,
    HAS_BASE: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
    EVEN_COLS: tl.constexpr, EVEN_DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out [rows, offs_c] = acc + left [M, LENGTH] right [LENGTH, C] + bias, as `operands` prepared the matrices."""
    cols = offs_c.to(tl.int64)
    if HAS_BASE:
        acc = base_product(
            acc, left, right, row, col, rows, offs_c, mask_c, stride_lm, stride_ll, stride_rl, stride_rc, LENGTH,
            TRANSPOSED, DESCRIPTORS, EVEN_COLS, EVEN_DEPTH, BLOCK_L, PRECISION,
        )  # fmt: skip
    if bias_ptr is not None:
        # [BLOCK_C]
        acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if DESCRIPTORS:
        store_tile(out, row, col, acc, BLOCK_M, BLOCK_C, PARTS)
    else:
        out_ptrs = out + rows[:, None] * stride_om + cols[None, :]
        tl.store(out_ptrs, acc.to(DTYPE), mask=mask_m[:, None] & mask_c[None, :])


@triton.jit
def finish_tile(
    y, acc, row, col, h_rows, mask_m, b_ptr, bias_ptr, offs_n, mask_n, stride_bn, stride_br, R,
    HAS_BIAS: tl.constexpr, STEP_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = acc + h b^T + bias through a descriptor: the end of a one-pass tile, when h is there."""
    # [BLOCK_M, R] [R, BLOCK_N]
    acc = rank_loop(
        acc, h_rows, mask_m, 1, b_ptr + offs_n.to(tl.int64) * stride_bn, mask_n, stride_br, R, STEP_R, DTYPE, PRECISION
    )
    if HAS_BIAS:
        # [BLOCK_N]
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    store_tile(y, row, col, acc, BLOCK_M, BLOCK_N, PARTS)
