"""The kernels beside the frozen linear layer and the alternatives: `python -m bench gpu`.

In:   which cases, providers and modes.
Out:  rows in bench/results/<gpu>.csv, a table per case, pass and mode, and the targets.
Who:  people, and `bench.plot` for the README's figures.

bf16, R = 16, M = 8192 where nothing else is said. The plain GEMM comes first: how near it is to cuBLAS bounds all that
follows. "frozen", the denominator, is F.linear, and in the backward dx = dy w alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import torch
import typer

from alora_kernels.ops.plans import PLANS

from .cuda import CudaClock
from .layers import BOTH, FORWARD
from .machine import slug
from .problem import Case
from .providers import PROVIDERS, find
from .rows import MODES, RESULTS
from .session import Session, choose
from .targets import DOWN, GPU_TARGETS, SQUARE, UP
from .work import LayerWork

_FUSED = ("frozen", "fused", *(f"fused:{plan}" for plan in PLANS))
_RIVALS = ("hoisted", "hoisted compiled", "authors' loop", "PEFT LoRA", "Unsloth-style addmm")
TASK = (*_FUSED, *_RIVALS, "grouped by task", "PEFT Poly", "grouped_mm multi-LoRA")
SOFT = (*_FUSED, *_RIVALS, "HydraLoRA")
WIDE = (*_FUSED, "hoisted", "PEFT LoRA", "Unsloth-style addmm")
FOUR = ("frozen", "fused", "PEFT LoRA", "grouped_mm multi-LoRA", "LoRAFusion")
SWEEP = ("frozen", "fused")
DECODE = ("frozen", "fused", "hoisted", "PEFT mixed batch", "grouped_mm multi-LoRA", "vLLM", "SGLang")
_SIZES = {SQUARE: (4096, 4096), UP: (4096, 14336), DOWN: (14336, 4096)}
_PLAIN = ("frozen", "plain Triton GEMM")


def _case(name: str, routing: str, size: str = SQUARE, m: int = 8192, e: int = 8, layout: str = "runs") -> Case:
    k, n = _SIZES[size]
    return Case(name, routing, m=m, k=k, n=n, e=e, dtype=torch.bfloat16, layout=layout, device="cuda")


def works(names: Sequence[str] = tuple(PROVIDERS)) -> list[LayerWork]:
    """All cases with the chosen providers; those that the most targets ask about come first."""

    def work(case: Case, providers: Sequence[str], directions: Sequence[str] = (FORWARD, BOTH)) -> LayerWork:
        return LayerWork(case, find(set(providers) & set(names)), directions)

    every = [work(_case(f"gemm {size}", "task", size, e=1), _PLAIN, [FORWARD]) for size in _SIZES]
    every += [work(_case(f"task {SQUARE}", "task"), TASK), work(_case(f"soft {SQUARE}", "soft"), SOFT)]
    every += [work(_case(f"task {size}", "task", size), WIDE) for size in (UP, DOWN)]
    every += [work(_case(f"decode {m}", "task", m=m, e=64, layout="rows"), DECODE, [FORWARD]) for m in (1, 8, 32, 64)]
    every += [work(_case(f"tasks {e}", "task", e=e), SWEEP) for e in (1, 8, 64, 1024)]
    every.append(work(_case(f"task E=4 {SQUARE}", "task", e=4), FOUR))
    return [w for w in every if w.providers]


def main(
    case: Annotated[list[str] | None, typer.Option(help="a case or a pattern such as 'decode *'; repeatable")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="measure these only; repeatable")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(MODES)}; repeatable")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 50,
    out: Annotated[Path | None, typer.Option(help="rows are appended to this CSV; default: the GPU's name")] = None,
) -> None:
    """The kernels on this machine's GPU, beside the frozen layer and the alternatives."""
    chosen = works(choose("provider", provider, list(PROVIDERS)))
    modes = choose("mode", mode, MODES)
    names = [work.case.name for work in chosen]
    if case:
        kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in case)]
        if not kept:
            raise typer.BadParameter(f"no case matches {', '.join(map(repr, case))}: choose from {', '.join(names)}")
        chosen = [work for work in chosen if work.case.name in kept]
    if not torch.cuda.is_available():
        typer.echo(
            "error: no CUDA device here. `python -m bench cpu` measures the CPU backend, `python -m bench static`"
            " compiles every kernel for four chips without running it",
            err=True,
        )
        raise typer.Exit(1)
    out = out or RESULTS / f"{slug(torch.cuda.get_device_name())}.csv"
    Session("gpu", "cuda", out, repeats, "frozen", GPU_TARGETS, CudaClock()).measure(chosen, modes)
