"""What every kernel costs before it ever runs: registers, spills and shared memory on four chips.

In:   nothing but the source; no GPU is needed. `TRITON_INTERPRET` must be unset.
Out:  a table (or JSON) with one row per compiled kernel variant and chip.
Who:  people choosing tile sizes, and `tests/compile`, which fails on a spill or on too much shared memory.

Each case runs all launchers on meta tensors inside `recording(chip)`, so what is compiled is exactly what
that chip would be asked to run: the same tiles, flags and pointer alignments. Equal launches are compiled
once. Run `python -m bench static`, or with `--all`, or `--json static.json`.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alora_kernels import kernels as ak
from alora_kernels.routing import RowGroups

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Case:
    """One layer whose forward and backward are recorded; letters as everywhere in the package."""

    routing: str
    dtype: torch.dtype
    m: int = 8192
    k: int = 4096
    n: int = 4096
    r: int = 16
    e: int = 8
    dropout: bool = False
    bias: bool = False
    base: bool = True
    adapter: torch.dtype | None = None  # None: like dtype
    precision: str = "highest"  # of float32 products: `torch.set_float32_matmul_precision`


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    [
        Case(routing, dtype, dropout=dropout, bias=not dropout)
        for routing in ("task", "soft")
        for dtype in (_BF16, _FP32)
        for dropout in (False, True)
    ]
    + [
        case
        for routing in ("task", "soft")
        for case in (
            Case(routing, _FP16, dropout=True),
            Case(routing, _BF16, r=8, e=1),
            Case(routing, _BF16, r=33, dropout=True),
            Case(routing, _BF16, r=64, dropout=True),
            Case(routing, _BF16, r=64, adapter=_FP32),
            Case(routing, _BF16, r=16, adapter=_FP32, dropout=True),
            Case(routing, _BF16, base=False),
            Case(routing, _BF16, base=False, dropout=True),
            Case(routing, _BF16, m=16, n=4000),
            Case(routing, _BF16, m=48, dropout=True),
            Case(routing, _BF16, k=1000, n=1001),
            Case(routing, _FP32, r=64, e=1),
            Case(routing, _FP32, r=64, e=8, dropout=True),
            Case(routing, _FP32, m=48),
            Case(routing, _FP32, precision="high"),
            Case(routing, _FP32, precision="high", dropout=True, r=64),
        )
    ]
    + [Case("soft", _BF16, e=64), Case("soft", _BF16, r=64, e=64, adapter=_FP32, dropout=True)]
)


def run_case(case: Case) -> None:
    """Call every launcher of one forward and backward on meta tensors."""

    def empty(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or case.dtype, device="meta")

    adapter = case.adapter or case.dtype
    x, w, dy = empty(case.m, case.k), empty(case.n, case.k), empty(case.m, case.n)
    a, b = empty(case.e, case.r, case.k, dtype=adapter), empty(case.n, case.r, dtype=adapter)
    router, bias = empty(case.e, case.k, dtype=adapter), empty(case.n) if case.bias else None
    drop = ak.Dropout(0.1, empty(1, dtype=torch.int64)) if case.dropout else None
    base_dy, base_w = (dy, w) if case.base else (None, None)
    ids, offsets = empty(case.m, dtype=torch.int32), empty(case.e + 1, dtype=torch.int32)
    groups = RowGroups(ids, ids, offsets)
    if case.routing == "task":
        h = ak.task_shrink(x, a, groups, scaling=2.0, dropout=drop)
    else:
        h, p = ak.soft_shrink(x, a, router, scaling=2.0, dropout=drop)
    if case.base:
        ak.linear_expand(x, w, bias, h, b)
    dh, _ = ak.expand_backward(dy, b, h, scaling=2.0)
    if case.routing == "task":
        ak.linear_dx_task(base_dy, base_w, dh, a, groups, dtype=case.dtype, dropout=drop)
        ak.task_da(dh, x, groups, case.e, dropout=drop, dtype=adapter)
    else:
        dp = ak.gate_backward(dh, p, case.e, dtype=case.dtype)
        ak.linear_dx_soft(base_dy, base_w, dp, a, router, dtype=case.dtype, dropout=drop)
        ak.soft_da(dp, x, case.e, dropout=drop, dtype=adapter)
    if drop is not None:
        ak.dropout_mask(case.m, case.k, drop, dtype=torch.float32)


@dataclass(frozen=True)
class Job:
    """One kernel variant for one chip, in a form that travels between processes."""

    chip: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Row:
    """What the compiler said about a job; sizes in bytes."""

    chip: str
    kernel: str
    variant: str
    registers: int
    spilled: int
    shared: int
    shared_limit: int


def to_job(chip: str, launch: ak.Launch) -> Job:
    """Specialise a recorded launch the way Triton would: 1 is a constant, multiples of 16 are marked."""
    meta = dict(launch.meta)
    num_warps, num_stages = meta.pop("num_warps", 4), meta.pop("num_stages", 2)
    signature, aligned = {}, []
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], meta[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            pointer = isinstance(value, Tensor)
            signature[name] = "*" + _NAMES[value.dtype] if pointer else ("i32" if value < 2**31 else "i64")
            if pointer or value % 16 == 0:
                aligned.append(i)
    signature |= dict.fromkeys(meta, "constexpr")
    order = [(name, signature[name]) for name in launch.kernel.arg_names]
    kernel = launch.kernel
    arguments = (tuple(order), tuple(meta.items()), tuple(aligned))
    return Job(chip, kernel.__module__, kernel.__name__, *arguments, num_warps, num_stages)


def jobs() -> Iterator[Job]:
    """Every distinct kernel variant of every case, for every chip."""
    for chip in TARGETS:
        with ak.recording(chip) as launches:
            for case in CASES:
                torch.set_float32_matmul_precision(case.precision)
                run_case(case)
            torch.set_float32_matmul_precision("highest")
        yield from dict.fromkeys(to_job(chip, launch) for launch in launches)


def compile_job(job: Job) -> Row:
    """Compile one job and read what it takes from the binary."""
    target, limit = TARGETS[job.chip]
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    attrs = {(i,): [["tt.divisibility", 16]] for i in job.aligned}
    source = ASTSource(kernel, dict(job.signature), dict(job.constexprs), attrs)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    built = triton.compile(source, target=target, options=options)
    registers, spilled = read_cubin(built.asm["cubin"]) if "cubin" in built.asm else read_amdgcn(built.asm["amdgcn"])
    return Row(job.chip, job.kernel, describe(job), registers, spilled, built.metadata.shared, limit)


def read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory (spills) per thread, from `cuobjdump`."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def read_amdgcn(asm: str) -> tuple[int, int]:
    """Vector registers per lane, and spilled plus scratch bytes, from the kernel's metadata."""
    usage = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", asm, re.MULTILINE)}
    spilled = 4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"]) + usage["private_segment_fixed_size"]
    return usage["vgpr_count"], spilled


def describe(job: Job) -> str:
    """A short name of the variant: the type of x or dy, block sizes, and the flags that are set."""
    kinds = [kind for _, kind in job.signature if kind.startswith("*")]
    # fp32 adapters next to bf16 activations show as e.g. "bf16+fp32"
    parts = ["+".join(sorted({kind[1:] for kind in kinds if kind[1] != "i"}))]
    for name, value in job.constexprs:
        if isinstance(value, bool):
            parts += [name.removeprefix("HAS_").lower()] if value else []
        elif isinstance(value, int) and name.startswith(("BLOCK_", "CHUNK", "E_PAD")):
            parts.append(f"{name.removeprefix('BLOCK_')}{value}")
    return " ".join([*parts, f"{job.num_warps}w{job.num_stages}s"])


def compile_all(workers: int) -> list[Row]:
    """Compile all jobs in `workers` processes, in the order of `jobs()`."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does when unset, without its warning
    context, todo = multiprocessing.get_context("spawn"), list(jobs())
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        done = pool.map(compile_job, todo)
        return list(track(done, "compiling", total=len(todo), console=Console(stderr=True)))


def summary(rows: list[Row]) -> Table:
    """One line per chip and kernel: the worst of its variants."""
    table = Table(
        "chip", "kernel", "variants", "registers", "spilled", "shared", "limit", title="worst of all variants"
    )
    for chip, kernel in dict.fromkeys((row.chip, row.kernel) for row in rows):
        same = [row for row in rows if (row.chip, row.kernel) == (chip, kernel)]
        most = {name: max(getattr(row, name) for row in same) for name in ("registers", "spilled", "shared")}
        bad = most["spilled"] > 0 or most["shared"] > same[0].shared_limit
        cells = (len(same), most["registers"], most["spilled"], f"{most['shared']:,}", f"{same[0].shared_limit:,}")
        table.add_row(chip, kernel, *map(str, cells), style="red" if bad else None)
    return table


def every(rows: list[Row]) -> Table:
    """One line per variant."""
    table = Table("chip", "kernel", "variant", "registers", "spilled", "shared", title="all variants")
    for row in rows:
        bad = row.spilled > 0 or row.shared > row.shared_limit
        cells = (row.chip, row.kernel, row.variant, row.registers, row.spilled, f"{row.shared:,}")
        table.add_row(*map(str, cells), style="red" if bad else None)
    return table


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here instead of a table")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="a line per variant, not only the worst of a kernel")] = False,
    workers: Annotated[int, typer.Option(help="compiler processes")] = min(os.cpu_count() or 1, 8),
) -> None:
    """Compile every kernel variant ahead of time for every chip, and report what it takes (3 minutes, no GPU)."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("TRITON_INTERPRET is set: the interpreter compiles nothing, unset it")
    rows = compile_all(workers)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        return
    Console(width=None if Console().is_terminal else 180).print(every(rows) if show_all else summary(rows))
