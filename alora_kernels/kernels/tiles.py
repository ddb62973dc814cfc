"""Tile sizes: frozen data, one row per (kernel, chip or kind of chip, bytes per element).

The chip is looked up when the first kernel is launched, never at import. Chips with less than 160 KiB of shared memory
per program (consumer cards, gfx942) and unknown ones are "other". What was measured on a chip (`tuned.py`) comes before
the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
import triton

from . import tuned
from .launch import recorded_chip


@dataclass(frozen=True)
class Tile:
    """The work of one program."""

    block_m: int  # rows (tokens)
    block_n: int  # output columns; of the shrinks those of p, of `expand_backward` those of dy
    block_k: int  # length of one step of the contraction
    num_warps: int
    num_stages: int  # software-pipeline depth
    parts: int = 1  # pieces in which a tile is stored through a descriptor; two leave room for one more stage


GROUP_M = 8  # row blocks that share the weight tiles in L2
MIN_PROGRAMS = 264  # two waves of 132 processors: reductions split their long axis until there are as many
MAX_RANK_BLOCK = 64  # wider ranks are cut; 128 columns next to a 128x256 tile would not fit in shared memory
DECODE_ROWS = 64  # up to here reading w is the time of a layer
LONG_ROWS = 2048  # from here on every tile size fills the chip
MAX_GATE = 1024  # experts of the soft routing: logits of one row are kept in registers

_KINDS = MappingProxyType(  # whose rows a chip takes where it has none of its own, the narrowest first
    {
        "sm_80": ("ampere",),
        "sm_87": ("ampere",),
        "sm_90": ("hopper_plus",),
        "sm_100": ("blackwell", "hopper_plus"),
        "sm_103": ("blackwell", "hopper_plus"),
        "sm_120": ("sm_120", "other"),
        "sm_121": ("sm_120", "other"),
        "interpreter": ("interpreter",),
    }
)
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Why these numbers: shared memory is 232,448 bytes on "hopper_plus" chips, 166,912 on "ampere" ones and 65,536 (gfx942)
# or ~101,000 (consumer cards) on "other" ones. `bench static` prints what each row takes, and checks no spills.
_TABLE = MappingProxyType(
    {
        # y = x w^T + low rank: the big GEMM.
        ("gemm", "hopper_plus", 2): Tile(128, 256, 64, 8, 3),
        ("gemm", "ampere", 2): Tile(128, 128, 64, 8, 3),
        ("gemm", "other", 2): Tile(128, 128, 32, 8, 2),
        ("gemm", "rdna", 2): Tile(128, 64, 32, 8, 2),
        ("gemm", "hopper_plus", 4): Tile(64, 128, 16, 8, 3),
        ("gemm", "ampere", 4): Tile(64, 64, 16, 8, 3),
        ("gemm", "other", 4): Tile(64, 64, 16, 8, 2),
        ("gemm", "sm_120", 4): Tile(64, 64, 32, 8, 2),
        # The same with at most 64 rows (decoding): bound by reading w, so many narrow programs.
        ("gemm_small", "hopper_plus", 2): Tile(64, 64, 64, 4, 4),
        ("gemm_small", "ampere", 2): Tile(64, 32, 128, 4, 3),
        ("gemm_small", "other", 2): Tile(64, 32, 64, 4, 2),
        ("gemm_small", "hopper_plus", 4): Tile(64, 32, 32, 4, 3),
        ("gemm_small", "ampere", 4): Tile(64, 32, 32, 4, 3),
        ("gemm_small", "other", 4): Tile(64, 32, 32, 4, 2),
        # The same with dropout or masks at the edges: philox state or masks live next to the accumulator.
        ("gemm_narrow", "hopper_plus", 2): Tile(128, 128, 64, 8, 3),
        ("gemm_narrow", "ampere", 2): Tile(128, 64, 32, 8, 4),
        ("gemm_narrow", "other", 2): Tile(64, 64, 32, 8, 2),
        ("gemm_narrow", "hopper_plus", 4): Tile(64, 64, 16, 8, 3),
        ("gemm_narrow", "ampere", 4): Tile(64, 64, 16, 8, 3),
        ("gemm_narrow", "other", 4): Tile(64, 64, 16, 8, 2),
        # The same with K or N that are no multiples of 16.
        ("gemm_ragged", "hopper_plus", 2): Tile(64, 64, 32, 8, 3),
        ("gemm_ragged", "ampere", 2): Tile(64, 64, 32, 8, 3),
        ("gemm_ragged", "other", 2): Tile(64, 64, 32, 8, 2),
        ("gemm_ragged", "hopper_plus", 4): Tile(64, 64, 16, 8, 3),
        ("gemm_ragged", "ampere", 4): Tile(64, 64, 16, 8, 3),
        ("gemm_ragged", "other", 4): Tile(64, 64, 16, 8, 2),
        # The same through tensor descriptors, on chips with a copy engine. 128x256x64 takes 229,408 of 232,448 bytes
        # with four stages and a store in two parts.
        ("gemm_descriptor", "hopper_plus", 2): Tile(128, 256, 64, 8, 4, 2),
        ("gemm_descriptor", "hopper_plus", 4): Tile(64, 128, 16, 8, 3),
        ("gemm_descriptor_narrow", "hopper_plus", 2): Tile(128, 128, 64, 8, 4),
        ("gemm_descriptor_narrow", "hopper_plus", 4): Tile(64, 64, 16, 8, 3),
        # The whole layer in one launch, 16 bits only: in float32 the low-rank part is no cost worth a flag. A leader's
        # h beside the tile leaves room for three stages. "narrow" is for dropout and for adapters of another dtype than
        # x, which pass through registers.
        ("one_pass_task", "hopper_plus", 2): Tile(128, 256, 64, 8, 3, 2),
        ("one_pass_task_narrow", "hopper_plus", 2): Tile(128, 128, 32, 8, 4),
        ("one_pass_soft", "hopper_plus", 2): Tile(128, 256, 64, 8, 3, 2),
        ("one_pass_soft", "blackwell", 2): Tile(128, 128, 64, 8, 3),  # 256 columns beside p spill 40 bytes there
        ("one_pass_soft_narrow", "hopper_plus", 2): Tile(128, 128, 32, 8, 4),
        # The whole layer for at most 64 rows: narrow tiles, or too few programs read w; three stages take 74 KB, so
        # that three programs share a processor and rows of A stream beside w.
        ("decode", "hopper_plus", 2): Tile(64, 32, 128, 4, 3),
        ("decode", "ampere", 2): Tile(64, 32, 128, 4, 3),
        ("decode", "other", 2): Tile(64, 32, 64, 4, 2),
        ("decode", "hopper_plus", 4): Tile(64, 32, 32, 4, 3),
        ("decode", "ampere", 4): Tile(64, 32, 32, 4, 3),
        ("decode", "other", 4): Tile(64, 32, 32, 4, 2),
        # h = s A_t x: reads x once; few rows per program, or the grid does not fill the chip. Here and below
        # "narrow" is for dropout or K that is no multiple of 16.
        ("shrink_task", "hopper_plus", 2): Tile(64, 64, 64, 4, 4),
        ("shrink_task", "ampere", 2): Tile(64, 64, 64, 4, 3),
        ("shrink_task", "other", 2): Tile(64, 64, 64, 4, 2),
        ("shrink_task", "rdna", 2): Tile(64, 64, 64, 8, 2),
        ("shrink_task", "hopper_plus", 4): Tile(64, 64, 32, 4, 3),
        ("shrink_task", "ampere", 4): Tile(64, 64, 32, 4, 3),
        ("shrink_task", "other", 4): Tile(64, 64, 32, 4, 2),
        ("shrink_task_narrow", "hopper_plus", 2): Tile(64, 64, 32, 4, 4),
        ("shrink_task_narrow", "ampere", 2): Tile(64, 64, 32, 4, 4),
        ("shrink_task_narrow", "other", 2): Tile(64, 64, 32, 4, 2),
        ("shrink_task_narrow", "hopper_plus", 4): Tile(64, 64, 16, 4, 3),
        ("shrink_task_narrow", "ampere", 4): Tile(64, 64, 16, 8, 3),
        ("shrink_task_narrow", "other", 4): Tile(64, 64, 16, 4, 2),
        # The same for all experts at once; block_n is how many columns of p one pass over x makes.
        ("shrink_soft", "hopper_plus", 2): Tile(64, 128, 64, 8, 3),
        ("shrink_soft", "ampere", 2): Tile(64, 128, 64, 8, 3),
        ("shrink_soft", "other", 2): Tile(64, 128, 32, 8, 2),
        ("shrink_soft", "sm_120", 2): Tile(32, 128, 32, 8, 3),
        ("shrink_soft", "hopper_plus", 4): Tile(32, 64, 16, 8, 4),
        ("shrink_soft", "ampere", 4): Tile(32, 64, 32, 8, 3),
        ("shrink_soft", "other", 4): Tile(32, 64, 16, 8, 2),
        ("shrink_soft_narrow", "hopper_plus", 2): Tile(64, 128, 32, 8, 3),
        ("shrink_soft_narrow", "ampere", 2): Tile(32, 128, 32, 8, 3),
        ("shrink_soft_narrow", "other", 2): Tile(64, 128, 32, 8, 2),
        ("shrink_soft_narrow", "rdna", 2): Tile(32, 128, 32, 8, 2),
        ("shrink_soft_narrow", "sm_120", 2): Tile(32, 128, 32, 8, 2),
        ("shrink_soft_narrow", "hopper_plus", 4): Tile(32, 64, 16, 8, 3),
        ("shrink_soft_narrow", "ampere", 4): Tile(32, 64, 16, 8, 3),
        ("shrink_soft_narrow", "other", 4): Tile(32, 64, 16, 8, 2),
        ("shrink_soft_narrow", "sm_120", 4): Tile(32, 64, 16, 4, 2),
        # dh and db in one pass over dy; block_n columns of dy stay with the program.
        ("expand_backward", "hopper_plus", 2): Tile(64, 256, 0, 8, 3),
        ("expand_backward", "ampere", 2): Tile(64, 128, 0, 8, 3),
        ("expand_backward", "other", 2): Tile(64, 128, 0, 4, 2),
        ("expand_backward", "sm_120", 2): Tile(64, 128, 0, 8, 2),
        ("expand_backward", "rdna", 2): Tile(32, 64, 0, 8, 2),  # a warp has half the lanes: more of them, or it spills
        ("expand_backward", "hopper_plus", 4): Tile(32, 64, 0, 8, 3),
        ("expand_backward", "ampere", 4): Tile(32, 64, 0, 8, 3),
        ("expand_backward", "other", 4): Tile(32, 64, 0, 4, 2),
        ("expand_backward", "rdna", 4): Tile(32, 32, 0, 8, 2),
        # da = dh^T x: block_n columns of x, block_m columns of dh at most, block_k rows per step.
        ("da", "hopper_plus", 2): Tile(128, 64, 64, 8, 3),
        ("da", "ampere", 2): Tile(128, 64, 64, 8, 3),
        ("da", "other", 2): Tile(128, 64, 32, 4, 2),
        ("da", "hopper_plus", 4): Tile(64, 64, 32, 4, 3),
        ("da", "ampere", 4): Tile(64, 64, 32, 4, 3),
        ("da", "other", 4): Tile(64, 64, 32, 4, 2),
        ("da", "sm_120", 2): Tile(128, 64, 32, 8, 3),
        ("da", "sm_120", 4): Tile(64, 64, 32, 8, 3),
        ("da", "rdna", 4): Tile(32, 64, 32, 8, 2),
    }
)
_DOUBLE = Tile(32, 32, 16, 4, 2)  # float64 exists for gradient checks; speed does not matter
_INTERPRETER = MappingProxyType(  # small, so that tests at small sizes go round every loop more than once
    {
        "da": Tile(32, 32, 16, 4, 1),
        "gemm_descriptor": Tile(16, 32, 16, 4, 1, 2),
        "one_pass_task": Tile(16, 32, 16, 4, 1, 2),
        "one_pass_soft": Tile(32, 32, 16, 4, 1, 2),
        "decode": Tile(64, 32, 16, 4, 1),
    }
)


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


def chip_class(chip: str) -> str:
    """Which rows of the table a chip takes: "hopper_plus", "ampere", "other" (also unknown ones) or "interpreter"."""
    return _kinds(chip)[-1]


def _kinds(chip: str) -> tuple[str, ...]:
    return _KINDS.get(chip) or (("rdna", "other") if chip.startswith(("gfx11", "gfx12")) else ("other",))


def is_amd(chip: str) -> bool:
    """Whether HIP compiles for the chip."""
    return chip.startswith("gfx")


def masked_operand_races(chip: str, products: int = 1) -> bool:
    """Whether a loop of so many products, one of x masked by dropout, must not be pipelined on a chip.

    Hopper reads the masked x from registers while the loop goes on, and Triton lets the next turn write them too early:
    before 3.7 in every such loop (triton issue 9433), and where a turn has another product still in 3.9, which then
    leaves one more of them in flight. One stage waits for each product; two stages do not.
    """
    return chip == "sm_90" and (products > 1 or TRITON < (3, 7))


def stages_for(tile: Tile, device: torch.device, *, dropped: bool, products: int) -> int:
    """Stages of a loop over x with so many products, one of them of x masked by dropout if `dropped`."""
    return 1 if dropped and masked_operand_races(chip_of(device), products) else tile.num_stages


def has_copy_engine(device: torch.device) -> bool:
    """Whether kernels reach matrices through tensor descriptors there: chips with TMA, and the interpreter."""
    return chip_class(chip_of(device)) in ("hopper_plus", "interpreter")


def overlaps_launches(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it is finished: NVIDIA's chips from Hopper on."""
    kind, _, number = chip_of(device).partition("_")
    return kind == "interpreter" or (kind == "sm" and int(number) >= 90)


@cache
def _device_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def persistent_programs(device: torch.device, tile: Tile) -> int:
    """How many persistent programs to launch: one per multiprocessor, two of tiles half as large, and so on.

    Tickets (`sync.py`) make any number right; this one fills the chip. 132 processors where it is only recorded.
    """
    processors = _device_processors(device) if device.type == "cuda" else 132
    return processors * max(1, 128 * 256 // (tile.block_m * tile.block_n))


def shape_class(rows: int, depth: int, cols: int) -> str:
    """The class of shapes that share a measurement: how many rows, and which side of the weight is long."""
    amount = "decode" if rows <= DECODE_ROWS else "short" if rows < LONG_ROWS else "long"
    return f"{amount} {'wide' if cols >= 2 * depth else 'tall' if depth >= 2 * cols else 'square'}"


_overridden: ContextVar[Mapping[str, Tile]] = ContextVar("alora_kernels_tiles", default=MappingProxyType({}))


@contextmanager
def override_tiles(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Use these tiles for these kernels inside the block: how `alora tune` measures a tile that is in no table."""
    token = _overridden.set(tiles)
    try:
        yield
    finally:
        _overridden.reset(token)


def has_tile(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel exists for a chip and an element type."""
    kind = chip_class(chip_of(device))
    return kind == "interpreter" or (kernel, kind, dtype.itemsize) in _TABLE


def tile_for(kernel: str, device: torch.device, dtype: torch.dtype, shapes: str = "") -> Tile:
    """The tile for a kernel: one that overrides, a measured one for this class of shapes, or that of the table.

    `dtype` is that of x or dy. Chips that the table does not name get the smallest tiles.
    """
    chip, bytes_each = chip_of(device), dtype.itemsize
    if kernel in _overridden.get():
        return _overridden.get()[kernel]
    table = tuned.find(device).table
    own = table.tiles.get(f"{kernel}/{bytes_each}/{shapes}") if table else None
    if measured := own or tuned.TILES.get((kernel, chip, bytes_each, shapes)):
        return Tile(*measured)
    if chip == "interpreter":
        return _INTERPRETER.get(kernel, Tile(16, 32, 16, 4, 1))
    if bytes_each == 8:
        return _DOUBLE
    return _row(kernel, chip, bytes_each)


@cache
def _row(kernel: str, chip: str, bytes_each: int) -> Tile:
    """The tile of the table, for the chip itself or for its kind."""
    rows = ((kernel, kind, bytes_each) for kind in (chip, *_kinds(chip)))
    return next(_TABLE[row] for row in rows if row in _TABLE)
