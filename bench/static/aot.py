"""Ahead-of-time compilation: from recorded launches to what the compiler made of them, for every chip.

Each case of `cases` runs launchers on meta tensors inside `recording(chip)`, so what is compiled is what that chip
would be asked to run. Equal launches are compiled once; instructions are counted in batches, because the disassembler
starts slowly.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.compiler import ASTSource, make_backend

from alora_kernels import kernels as ak

from .cases import CASES, run_case
from .cubin import CHIPS, Counts, code_of, count_amdgcn, count_codes, occupancy, read_amdgcn, read_cubin
from .ptx import hazards

CHUNK = 12  # jobs that share one run of the disassembler


@dataclass(frozen=True)
class Job:
    """One kernel variant for one chip, in a form that travels between processes."""

    chip: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[int, str], ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """What the compiler said about a job; sizes in bytes."""

    chip: str
    kernel: str
    variant: str
    dtypes: str
    blocks: dict[str, int]
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    shared_limit: int = 0
    warps: int = 0
    programs: int = 0
    limit: str = ""
    tensor: dict[str, int] = field(default_factory=dict)
    bulk: int = 0
    copies: int = 0
    atomics: int = 0
    error: str = ""
    hazards: tuple[str, ...] = ()  # rules of `ptx` that it breaks

    @property
    def bad(self) -> bool:
        """Whether the variant would be slow, wrong, or could not run at all."""
        return bool(self.error or self.hazards) or self.spilled > 0 or self.programs < 1


def short_name(kernel: str) -> str:
    """The name people know a kernel by: `_expand_kernel` is `expand`."""
    return kernel.removeprefix("_").removesuffix("_kernel")


def to_job(chip: str, launch: ak.Launch) -> Job:
    """Specialise a recorded launch the way Triton does when it launches it.

    Triton's own function decides: None and 1 are constants, a tensor descriptor becomes `tensordesc<bf16[128, 64]>`
    (its block shape is part of the type, its strides are not), and attributes say what is a multiple of 16.
    """
    backend, meta = type(make_backend(CHIPS[chip].target)), dict(launch.meta)
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    signature, attributes, constexprs = [], [], []
    for param in launch.kernel.params:
        value = given[param.name] if param.name in given else meta.get(param.name, param.default)
        kind, attribute = "constexpr", None
        if not param.is_constexpr:
            specialise, align = not param.do_not_specialize, not param.do_not_specialize_on_alignment
            kind, attribute = native_specialize_impl(backend, value, param.is_const, specialise, align)
            kind = param.annotation_type or kind
        signature.append((param.name, kind))
        if kind == "constexpr":
            constexprs.append((param.name, value))
        elif isinstance(attribute, str) and attribute:
            attributes.append((param.num, attribute))
    options = tuple((name, value) for name, value in meta.items() if name not in launch.kernel.arg_names)
    parts = (tuple(signature), tuple(constexprs), tuple(attributes), options)
    return Job(chip, launch.kernel.__module__, launch.kernel.__name__, *parts)


def _recorded(chip: str) -> list[ak.Launch]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision  # put back: "highest" would overrule `torch.backends.fp32_precision`
    try:
        with ak.recording(chip) as launches:
            for case in CASES:
                matmul.fp32_precision = case.precision
                run_case(case)
    finally:
        matmul.fp32_precision = before
    return launches


def kernel_names() -> list[str]:
    """Short names of all kernels: those that the cases launch on a chip that takes every one."""
    return sorted({short_name(launch.kernel.__name__) for launch in _recorded("sm_90")})


def jobs(chips: Collection[str] = tuple(CHIPS), kernels: Collection[str] = ()) -> Iterator[Job]:
    """Every distinct kernel variant of every case, for the chips and kernels named (no kernel: all of them)."""
    for chip in chips:
        wanted = [launch for launch in _recorded(chip) if not kernels or short_name(launch.kernel.__name__) in kernels]
        yield from dict.fromkeys(to_job(chip, launch) for launch in wanted)


def build(job: Job) -> Any:
    """What Triton makes of a job: `asm` by language, `metadata`."""
    chip = CHIPS[job.chip]
    backend = make_backend(chip.target)
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    attrs = {(i,): backend.parse_attr(attribute) for i, attribute in job.attributes}
    source = ASTSource(kernel, dict(job.signature), dict(job.constexprs), attrs)
    return triton.compile(source, target=chip.target, options=dict(job.options))


def awaited(job: Job) -> int | None:
    """Where h is among the pointers of a launch that overlaps the one which stores it; None of other launches."""
    pointers = [name for name, kind in job.signature if kind.startswith("*")]
    return pointers.index("h_ptr") if dict(job.options).get("launch_pdl") else None


def compile_job(job: Job) -> tuple[Row, bytes | str]:
    """Compile one job; the row lacks instruction counts, which the code (or amdgcn text) holds."""
    chip, built = CHIPS[job.chip], build(job)
    binary = built.asm.get("cubin")
    usage = read_amdgcn(built.asm["amdgcn"]) if binary is None else read_cubin(binary)
    taken = {"shared": built.metadata.shared, "warps": built.metadata.num_warps}
    tensor_columns = getattr(built.metadata, "tmem_size", None) or 0
    fits = occupancy(chip, registers=usage.registers, **taken, tensor_columns=tensor_columns)
    facts = usage._asdict() | taken | fits._asdict()
    broken = () if binary is None else tuple(hazards(built.asm["ptx"], awaited(job)))
    row = Row(**described(job), **facts, shared_limit=chip.shared_limit, hazards=broken)
    return row, built.asm["amdgcn"] if binary is None else code_of(binary)


def compile_chunk(chunk: Sequence[Job]) -> list[Row]:
    """Compile jobs of one chip and count their instructions; a job that fails gives a row with its error."""
    rows, codes = [], []
    for job in chunk:
        try:
            row, code = compile_job(job)
        except Exception as error:  # one broken variant must not hide the others
            row, code = Row(**described(job), error=f"{type(error).__name__}: {error}"[:2000]), b""
        rows.append(row)
        codes.append(code)
    counts: dict[int, Counts] = {i: count_amdgcn(code) for i, code in enumerate(codes) if isinstance(code, str)}
    binary = {i: code for i, code in enumerate(codes) if isinstance(code, bytes) and code}
    counts |= zip(binary, count_codes(list(binary.values()), CHIPS[chunk[0].chip].image), strict=True)
    return [Row(**asdict(row) | asdict(counts[i])) if i in counts else row for i, row in enumerate(rows)]


def described(job: Job) -> dict[str, Any]:
    """Chip, kernel, element types, block sizes and a short name of the variant, with the flags that are set."""
    kinds = [kind for _, kind in job.signature if kind.startswith(("*", "tensordesc"))]
    names = {kind.removeprefix("*").removeprefix("tensordesc<").split("[")[0] for kind in kinds}
    # fp32 adapters next to bf16 activations show as e.g. "bf16+fp32"
    dtypes = "+".join(sorted(name for name in names if not name.startswith(("i", "u"))))
    flags, blocks = [], {}
    for name, value in job.constexprs:
        if value is True:
            flags.append(name.removeprefix("HAS_").lower())
        elif isinstance(value, int) and name.startswith(("BLOCK_", "CHUNK", "E_PAD", "PARTS")) and value is not False:
            blocks[name.removeprefix("BLOCK_")] = value
    options = dict(job.options)
    size = f"{options.get('num_warps', 4)}w{options.get('num_stages', 3)}s"
    variant = " ".join([dtypes, *flags, *(f"{name}{value}" for name, value in blocks.items()), size])
    return {"chip": job.chip, "kernel": short_name(job.kernel), "variant": variant, "dtypes": dtypes, "blocks": blocks}


def compile_all(todo: Sequence[Job], workers: int, advance: Callable[[int], Any] = lambda number: None) -> list[Row]:
    """Compile all jobs in `workers` processes; rows come in their order, `advance` gets numbers of jobs as they end."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does when unset, without its warning
    context = multiprocessing.get_context("spawn")
    chunks: list[list[Job]] = []
    for job in todo:
        if not chunks or len(chunks[-1]) == CHUNK or chunks[-1][0].chip != job.chip:
            chunks.append([])
        chunks[-1].append(job)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = [pool.submit(compile_chunk, chunk) for chunk in chunks]
        for future in as_completed(pending):
            advance(len(future.result()))
        return [row for future in pending for row in future.result()]
