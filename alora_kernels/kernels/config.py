"""Tile sizes: frozen data, one row per (kernel idea, kind of chip, bytes per element).

In:   the idea a launcher implements, the device and dtype of its tensors.
Out:  a `Tile`: how many rows, columns and K-steps one program takes, its warps and pipeline stages.
Who:  every launcher, and nobody else.

The chip is looked up when the first kernel is launched, never at import. Chips with less than 160 KiB of
shared memory per program (consumer cards, gfx942) and unknown ones share the rows called "small"; the
interpreter has its own, so that tests at small sizes go round every loop more than once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
import triton

from .launch import recorded_chip


@dataclass(frozen=True)
class Tile:
    """The work of one program.

    Attributes:
        block_m: rows (tokens).
        block_n: output columns; for the shrinks the columns of p, for `expand_backward` those of dy.
        block_k: length of one step of the contraction.
        num_warps: warps per program.
        num_stages: software-pipeline depth.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


GROUP_M = 8  # row blocks that share the weight tiles in L2
MIN_PROGRAMS = 264  # two waves of 132 processors: reductions split their long axis until there are as many
MAX_RANK_BLOCK = 64  # wider ranks are cut; 128 columns next to a 128x256 tile would not fit in shared memory
MAX_GATE = 1024  # experts of the soft routing: logits of one row are kept in registers

_CHIP_CLASS = MappingProxyType(
    {"sm_80": "big", "sm_87": "big", "sm_90": "huge", "sm_100": "huge", "sm_103": "huge", "interpreter": "interpreter"}
)

# Why these numbers: shared memory is 232,448 bytes on "huge" chips, 166,912 on "big" ones and 65,536 (gfx942) or
# ~101,000 (consumer cards) on "small" ones. `bench.static` prints what each row really takes, and checks no spills.
_TABLE = MappingProxyType(
    {
        # y = x w^T + low rank: the big GEMM.
        ("gemm", "huge", 2): Tile(128, 256, 64, 8, 3),
        ("gemm", "big", 2): Tile(128, 128, 64, 8, 3),
        ("gemm", "small", 2): Tile(128, 128, 32, 8, 2),
        ("gemm", "huge", 4): Tile(64, 128, 16, 8, 3),
        ("gemm", "big", 4): Tile(128, 64, 16, 8, 3),
        ("gemm", "small", 4): Tile(64, 64, 16, 8, 2),
        # The same with at most 64 rows (decoding): bound by reading w, so many narrow programs.
        ("gemm_small", "huge", 2): Tile(64, 64, 64, 4, 4),
        ("gemm_small", "big", 2): Tile(64, 32, 128, 4, 3),
        ("gemm_small", "small", 2): Tile(64, 32, 64, 4, 2),
        ("gemm_small", "huge", 4): Tile(64, 32, 32, 4, 3),
        ("gemm_small", "big", 4): Tile(64, 32, 32, 4, 3),
        ("gemm_small", "small", 4): Tile(64, 32, 32, 4, 2),
        # The same with dropout or masks at the edges: philox state or masks live next to the accumulator.
        ("gemm_narrow", "huge", 2): Tile(128, 128, 64, 8, 3),
        ("gemm_narrow", "big", 2): Tile(128, 64, 32, 8, 4),
        ("gemm_narrow", "small", 2): Tile(64, 64, 32, 8, 2),
        ("gemm_narrow", "huge", 4): Tile(64, 64, 16, 8, 3),
        ("gemm_narrow", "big", 4): Tile(64, 64, 16, 8, 3),
        ("gemm_narrow", "small", 4): Tile(64, 64, 16, 8, 2),
        # The same with K or N that are no multiples of 16.
        ("gemm_ragged", "huge", 2): Tile(64, 64, 32, 8, 3),
        ("gemm_ragged", "big", 2): Tile(64, 64, 32, 8, 3),
        ("gemm_ragged", "small", 2): Tile(64, 64, 32, 8, 2),
        ("gemm_ragged", "huge", 4): Tile(64, 64, 16, 8, 3),
        ("gemm_ragged", "big", 4): Tile(64, 64, 16, 8, 3),
        ("gemm_ragged", "small", 4): Tile(64, 64, 16, 8, 2),
        # h = s A_t x: reads x once; few rows per program, or the grid does not fill the chip. Here and below
        # "narrow" is for dropout or K that is no multiple of 16.
        ("task_shrink", "huge", 2): Tile(64, 64, 64, 4, 4),
        ("task_shrink", "big", 2): Tile(64, 64, 64, 4, 3),
        ("task_shrink", "small", 2): Tile(64, 64, 64, 4, 2),
        ("task_shrink", "huge", 4): Tile(64, 64, 32, 4, 3),
        ("task_shrink", "big", 4): Tile(64, 64, 32, 4, 3),
        ("task_shrink", "small", 4): Tile(64, 64, 32, 4, 2),
        ("task_shrink_narrow", "huge", 2): Tile(64, 64, 32, 4, 4),
        ("task_shrink_narrow", "big", 2): Tile(64, 64, 32, 4, 4),
        ("task_shrink_narrow", "small", 2): Tile(64, 64, 32, 4, 2),
        ("task_shrink_narrow", "huge", 4): Tile(64, 64, 16, 4, 3),
        ("task_shrink_narrow", "big", 4): Tile(64, 64, 16, 8, 3),
        ("task_shrink_narrow", "small", 4): Tile(64, 64, 16, 4, 2),
        # The same for all experts at once; block_n is how many columns of p one pass over x makes.
        ("soft_shrink", "huge", 2): Tile(64, 128, 64, 8, 3),
        ("soft_shrink", "big", 2): Tile(64, 128, 64, 8, 3),
        ("soft_shrink", "small", 2): Tile(64, 128, 32, 8, 2),
        ("soft_shrink", "huge", 4): Tile(32, 64, 16, 8, 4),
        ("soft_shrink", "big", 4): Tile(32, 64, 32, 8, 3),
        ("soft_shrink", "small", 4): Tile(32, 64, 16, 8, 2),
        ("soft_shrink_narrow", "huge", 2): Tile(64, 128, 32, 8, 3),
        ("soft_shrink_narrow", "big", 2): Tile(32, 128, 32, 8, 3),
        ("soft_shrink_narrow", "small", 2): Tile(64, 128, 32, 8, 2),
        ("soft_shrink_narrow", "huge", 4): Tile(32, 64, 16, 8, 3),
        ("soft_shrink_narrow", "big", 4): Tile(32, 64, 16, 8, 3),
        ("soft_shrink_narrow", "small", 4): Tile(32, 64, 16, 8, 2),
        # dh and db in one pass over dy; block_n columns of dy stay with the program.
        ("expand_backward", "huge", 2): Tile(64, 256, 0, 8, 3),
        ("expand_backward", "big", 2): Tile(64, 128, 0, 8, 3),
        ("expand_backward", "small", 2): Tile(64, 128, 0, 4, 2),
        ("expand_backward", "huge", 4): Tile(32, 64, 0, 8, 3),
        ("expand_backward", "big", 4): Tile(32, 64, 0, 8, 3),
        ("expand_backward", "small", 4): Tile(32, 64, 0, 4, 2),
        # da = dh^T x: block_n columns of x, block_m columns of dh at most, block_k rows per step.
        ("wgrad", "huge", 2): Tile(128, 64, 64, 8, 3),
        ("wgrad", "big", 2): Tile(128, 64, 64, 8, 3),
        ("wgrad", "small", 2): Tile(128, 64, 32, 4, 2),
        ("wgrad", "huge", 4): Tile(64, 64, 32, 4, 3),
        ("wgrad", "big", 4): Tile(64, 64, 32, 4, 3),
        ("wgrad", "small", 4): Tile(64, 64, 32, 4, 2),
    }
)
_DOUBLE = Tile(32, 32, 16, 4, 2)  # float64 exists for gradient checks; speed does not matter
_INTERPRETER = MappingProxyType({"wgrad": Tile(32, 32, 16, 4, 1)})


@cache
def _device_chip(device: torch.device) -> str:
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def chip_of(device: torch.device) -> str:
    """Name of the chip, e.g. `sm_90`, `gfx942` or `interpreter`; inside `recording`, the recorded one."""
    return recorded_chip() or _device_chip(device)


def tile_for(idea: str, device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile for a kernel idea.

    Args:
        idea: first column of the table, e.g. `"gemm"`.
        device: where the tensors are.
        dtype: element type of x or dy.

    Returns:
        The row of the table; chips it does not name get the smallest tiles.
    """
    kind = _CHIP_CLASS.get(chip_of(device), "small")
    if kind == "interpreter":
        return _INTERPRETER.get(idea, Tile(16, 32, 16, 4, 1))
    return _DOUBLE if dtype.itemsize == 8 else _TABLE[idea, kind, dtype.itemsize]
