"""Which precision each number is kept in, and how ranks and lengths are cut into blocks: constexprs of all launchers.

One rule: products are taken in x's dtype, sums, logits and softmax in the accumulator dtype (float32, or float64 when x
is float64), and each result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from alora_kernels.records import acc_dtype

from .tiles import MAX_RANK_BLOCK, Tile, chip_of, is_amd

_NAMES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton name of a torch float dtype."""
    return _NAMES.get(dtype, tl.float64)


# `triton.cdiv` and `triton.next_power_of_2` run an import at every call: 28 of them were a fifth of a layer's host time
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`"ieee"`, or for float32, if the user allowed less, `"tf32"`: three bf16 products on chips that lack it.

    `torch.backends.cuda.matmul.fp32_precision` knows of every way to allow it, `torch.set_float32_matmul_precision`
    among them; the getters of the older ways raise once a newer one was used.
    """
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    chip = chip_of(device)
    return "bf16x3" if is_amd(chip) and chip != "gfx942" else "tf32"  # of AMD's chips CDNA 3 alone multiplies it


def common(tile: Tile, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What every kernel with products in `dtype` is launched with besides its blocks."""
    sums = {"PRECISION": dot_precision(dtype, device), "ACC": tl_dtype(acc_dtype(dtype))}
    return {**sums, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def kernel_scaling(scaling: float, dtype: torch.dtype) -> tuple[float, float]:
    """s as `(inside, outside)`: the factor applied inside a kernel and the one that is left for afterwards.

    Kernels receive floats as float32. That is exact enough for every dtype but float64, where s is applied by torch
    instead.
    """
    return (1.0, float(scaling)) if dtype == torch.float64 else (float(scaling), 1.0)


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that holds `size`, kept within `[low, high]`."""
    return min(max(next_power_of_2(size), low), high)


def rank_block(rank: int, dtype: torch.dtype) -> int:
    """Columns of a rank block: at least 16 (the least a dot takes), at most 64, or 32 for float32."""
    return power_of_two(rank, 16, MAX_RANK_BLOCK if dtype.itemsize == 2 else MAX_RANK_BLOCK // 2)


def rank_step(rank: int, dtype: torch.dtype, widest: int = 32) -> int:
    """Ranks that one step of `rank_loop` takes next to a GEMM tile: at most 32, or 16 for float32.

    A [32, 256] piece of A in float32 beside a 128x256 accumulator still fits in 255 registers; 64 rows spill.
    """
    return power_of_two(rank, 16, widest if dtype.itemsize == 2 else 16)


def splits_for(programs: int, blocks: int, wanted: int) -> int:
    """How many parts to cut a reduction of `blocks` blocks into, none empty, to turn `programs` into some `wanted`."""
    return max(1, min(cdiv(wanted, max(programs, 1)), blocks))
