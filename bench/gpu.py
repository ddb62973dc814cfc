"""The kernels beside the frozen linear layer and the alternatives: `python -m bench gpu`.

bf16, R = 16, M = 8192 where nothing else is said. The plain GEMM comes first: how near it is to cuBLAS bounds all that
follows. "frozen", the denominator, is F.linear, and in the backward dx = dy w alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from alora_kernels.ops.dispatch import PLANS

from .layers.layer import layer_work
from .layers.problem import Case
from .layers.providers import PROVIDERS, find
from .models import decoding, training
from .models.pair import FROZEN, Setting, eight_billion, model_work
from .report.rows import FORWARD, MODES, PASSES, RESULTS, slug
from .report.targets import DOWN, GPU_TARGETS, SQUARE, UP
from .run import Work, choose, measure
from .timing import CudaClock

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


STEP = Setting(
    "model step", tasks=8, rows=8, tokens=1024, answer=64, r=16, alpha=32, dtype=torch.bfloat16, device="cuda"
)
TOKEN = Setting("model decode", tasks=64, rows=64, tokens=512, r=16, alpha=32, dtype=torch.bfloat16, device="cuda")
MODELS = tuple(dict.fromkeys((FROZEN, *training.MODELS, *decoding.MODELS)))


def models(names: Sequence[str], layers: int) -> list[Work]:
    width, base = _SIZES[SQUARE][0], eight_billion(layers)
    shape = f"{layers} layers of Llama 3 8B, random weights; k and n are its hidden size"
    in_step = [name for name in (FROZEN, *training.MODELS) if name in names]
    in_decode = [name for name in decoding.MODELS if name in names]
    found: list[Work] = []
    if in_step:
        note = f"{shape}; {STEP.rows} rows of {STEP.tokens} tokens, the last {STEP.answer} supervised"
        found.append(model_work(in_step, training.Training(base, STEP), width=width, note=note))
    if in_decode:
        note = f"{shape}; {TOKEN.tokens} tokens of context"
        found.append(model_work(in_decode, decoding.Decoding(base, TOKEN), width=width, note=note))
    return found


def works(names: Sequence[str] = tuple(PROVIDERS)) -> list[Work]:
    """All cases with the chosen providers; those that the most targets ask about come first."""

    def work(case: Case, providers: Sequence[str], directions: Sequence[str] = PASSES) -> Work:
        return layer_work(case, find(set(providers) & set(names)), directions)

    every = [work(_case(f"gemm {size}", "task", size, e=1), _PLAIN, [FORWARD]) for size in _SIZES]
    every += [work(_case(f"task {SQUARE}", "task"), TASK), work(_case(f"soft {SQUARE}", "soft"), SOFT)]
    every += [work(_case(f"task {size}", "task", size), WIDE) for size in (UP, DOWN)]
    every += [work(_case(f"decode {m}", "task", m=m, e=64, layout="rows"), DECODE, [FORWARD]) for m in (1, 8, 32, 64)]
    every += [work(_case(f"tasks {e}", "task", e=e), SWEEP) for e in (1, 8, 64, 1024)]
    every.append(work(_case(f"task E=4 {SQUARE}", "task", e=4), FOUR))
    return [w for w in every if w.candidates()]


def main(
    case: Annotated[list[str] | None, typer.Option(help="a case or a pattern such as 'decode *'; repeatable")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="measure these only; repeatable")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(MODES)}; repeatable")] = None,
    layers: Annotated[int, typer.Option(min=1, help="of the whole models; Llama 3 8B has 32")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 50,
    out: Annotated[Path | None, typer.Option(help="rows are appended to this CSV; default: the GPU's name")] = None,
) -> None:
    """The kernels on this machine's GPU, beside the frozen layer and the alternatives."""
    providers = choose("provider", provider, list(dict.fromkeys((*PROVIDERS, *MODELS))))
    chosen: list[Work] = [*works([name for name in providers if name in PROVIDERS]), *models(providers, layers)]
    modes = choose("mode", mode, MODES)
    names = [work.row.case for work in chosen]
    if case:
        kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in case)]
        if not kept:
            raise typer.BadParameter(f"no case matches {', '.join(map(repr, case))}: choose from {', '.join(names)}")
        chosen = [work for work in chosen if work.row.case in kept]
    if not torch.cuda.is_available():
        typer.echo(
            "error: no CUDA device here. `python -m bench cpu` measures the CPU backend, `python -m bench static`"
            " compiles every kernel for four chips without running it",
            err=True,
        )
        raise typer.Exit(1)
    out = out or RESULTS / f"{slug(torch.cuda.get_device_name())}.csv"
    known: Any = {"denominator": "frozen", "targets": GPU_TARGETS, "clock": CudaClock()}
    measure("gpu", "cuda", chosen, modes, out=out, repeats=repeats, **known)
