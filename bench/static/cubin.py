"""What a compiled kernel is made of, and how many of its programs fit on one processor of the chip.

The disassembler takes 0.2 s to start and about 15 us an instruction, so many cubins go through it at once: `.text`
sections one after another are a raw image of the chip, and instruction addresses tell them apart again.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Chip:
    """What the compiler and the occupancy need to know of a chip.

    Source: tables "technical specifications per compute capability" of the CUDA C++ programming guide; "CDNA3
    instruction set architecture" and LLVM's AMDGPU guide for AMD's.
    """

    target: GPUTarget
    image: str  # as the disassembler names it; "" for AMD
    shared_limit: int  # bytes of shared memory one program may have
    shared: int  # bytes that all programs of a multiprocessor share
    reserved: int  # bytes that the system takes of it for each program
    registers: int  # 32-bit registers of one lane in one of the four partitions, all warps together
    granule: int  # warps are given registers in multiples of this, per lane
    warps: int  # that fit in one partition at most
    programs: int  # that fit on a multiprocessor at most
    tensor_columns: int = 0  # of tensor memory; 0 where there is none


def _nvidia(capability: int, image: str, limit: int, warps: int, programs: int, columns: int = 0) -> Chip:
    target = GPUTarget("cuda", capability, 32)
    return Chip(target, image, limit, limit + 1024, 1024, 512, 8, warps, programs, columns)


def _amd(name: str, lanes: int, limit: int, shared: int, *partition: int) -> Chip:
    return Chip(GPUTarget("hip", name, lanes), "", limit, shared, 0, *partition)


CHIPS = {
    "sm_80": _nvidia(80, "SM80", 166_912, 16, 32),
    "sm_86": _nvidia(86, "SM86", 101_376, 12, 16),
    "sm_89": _nvidia(89, "SM89", 101_376, 12, 24),
    "sm_90": _nvidia(90, "SM90a", 232_448, 16, 32),
    "sm_100": _nvidia(100, "SM100a", 232_448, 16, 32, 512),
    "sm_103": _nvidia(103, "SM103a", 232_448, 16, 32, 512),
    "sm_120": _nvidia(120, "SM120a", 101_376, 12, 24),
    "gfx942": _amd("gfx942", 64, 65_536, 65_536, 512, 8, 8, 16),
    "gfx950": _amd("gfx950", 64, 163_840, 163_840, 512, 8, 8, 16),
    "gfx1100": _amd("gfx1100", 32, 65_536, 131_072, 1536, 24, 16, 32),  # of a workgroup processor: two compute units
    "gfx1201": _amd("gfx1201", 32, 65_536, 131_072, 1536, 24, 16, 32),
}


class Usage(NamedTuple):
    """Registers per thread, and bytes per thread that did not fit in them."""

    registers: int
    spilled: int


@dataclass(frozen=True)
class Counts:
    """Instructions of a kernel's code, each counted once however often it runs.

    `tensor`: tensor-core products by mnemonic; `bulk`: copies of whole tiles by the copy engine (TMA), both directions;
    `copies`: asynchronous ones from global to shared memory, issued by threads; `atomics`: on global memory.
    """

    tensor: dict[str, int]
    bulk: int
    copies: int
    atomics: int


class Occupancy(NamedTuple):
    """Programs that run on one multiprocessor at the same time, and the resource that allows no more."""

    programs: int
    limit: str


# HGMMA: warpgroups on sm_90; HMMA: warps; UTCHMMA and the like: tensor memory on sm_100; v_mfma, v_wmma: AMD
_TENSOR = re.compile(r"HGMMA|QGMMA|IGMMA|BGMMA|HMMA|QMMA|IMMA|DMMA|UTC\w*MMA\w*|v_s?mfma\w*|v_s?wmma\w*")
_BULK = re.compile(r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP")
_COPY = re.compile(r"LDGSTS|(global|buffer)_load_lds\w*")
_ATOMIC = re.compile(r"ATOMG?|REDG?|(global|buffer|flat)_atomic\w*")


def count(mnemonics: Sequence[str]) -> Counts:
    """Sort mnemonics, e.g. `["HGMMA", "IADD3", ...]`, into the kinds that are counted."""
    found = Counter(mnemonics)

    def total(pattern: re.Pattern[str]) -> int:
        return sum(times for name, times in found.items() if pattern.fullmatch(name))

    tensor = {name: times for name, times in sorted(found.items()) if _TENSOR.fullmatch(name)}
    return Counts(tensor, total(_BULK), total(_COPY), total(_ATOMIC))


def _tool(name: str, options: list[str], data: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(data)
        file.flush()
        command = [str(_TOOLS / name), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: bytes) -> Usage:
    """Registers per thread and bytes of local memory (spills) per thread, from `cuobjdump`."""
    text = _tool("cuobjdump", ["--dump-resource-usage"], cubin)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(usage["REG"], usage["STACK"] + usage["LOCAL"])


def code_of(cubin: bytes) -> bytes:
    """The instructions of the cubin's one kernel: its `.text` section."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin: it does not begin like a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # name, type, flags, address, offset, length, and four more that do not matter here
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    first = sections[names][4]
    code = [s for s in sections if cubin.startswith(b".text.", first + s[0])]
    if len(code) != 1:
        raise ValueError(f"a cubin of one kernel was expected, this one has {len(code)}")
    offset, length = code[0][4:]
    return cubin[offset : offset + length]


def count_codes(codes: Sequence[bytes], image: str) -> list[Counts]:
    """Instruction counts of several kernels (`code_of`) for one `Chip.image`, in one run of the disassembler."""
    if not codes:
        return []
    text = _tool("nvdisasm", ["--no-dataflow", "--binary", image], b"".join(codes))
    # "/*0040*/  @!P1 HGMMA.64x256x16.F32.BF16 R24, ... ;"
    lines = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(\w+)", text, re.MULTILINE)
    mnemonics: list[list[str]] = [[] for _ in codes]
    kernel, end = 0, len(codes[0])
    for address, mnemonic in lines:
        while int(address, 16) >= end:
            kernel += 1
            end += len(codes[kernel])
        mnemonics[kernel].append(mnemonic)
    return [count(names) for names in mnemonics]


def read_amdgcn(asm: str) -> Usage:
    """Vector registers per lane, and scratch bytes per lane, from the kernel's metadata.

    Scalar registers that overflow go to lanes of a vector register, not to memory, so they are not counted.
    """
    usage = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", asm, re.MULTILINE)}
    return Usage(usage["vgpr_count"], usage["private_segment_fixed_size"])


def count_amdgcn(asm: str) -> Counts:
    """Instruction counts of amdgcn text; a buffer load with `lds` goes to shared memory."""
    lines = re.findall(r"^\s+([a-z]\w+)(.*)$", asm, re.MULTILINE)
    to_lds = re.compile(r"(global|buffer)_load_\w+")
    return count(
        ["buffer_load_lds" if to_lds.fullmatch(name) and rest.split()[-1:] == ["lds"] else name for name, rest in lines]
    )


def occupancy(chip: Chip, *, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> Occupancy:
    """Programs per multiprocessor, or compute unit, when only this kernel runs.

    Formula: each resource allows `available // taken` programs; the scarcest one decides, 0 when one alone does not
    fit. Warps are dealt to four partitions, each with its own registers. `registers` are per thread, all else per
    program, `shared` in bytes.
    """
    per_lane = triton.cdiv(max(registers, 1), chip.granule) * chip.granule
    allowed = {
        "registers": 4 * (chip.registers // per_lane) // warps,
        "shared memory": chip.shared // max(triton.cdiv(shared, 128) * 128 + chip.reserved, 1),
        "warps": 4 * chip.warps // warps,
        "programs": chip.programs,
    }
    if chip.tensor_columns:
        allowed["tensor memory"] = chip.tensor_columns // max(tensor_columns, 1)
    if shared > chip.shared_limit:
        allowed["shared memory"] = 0
    limit = min(allowed, key=lambda name: allowed[name])
    return Occupancy(allowed[limit], limit)
