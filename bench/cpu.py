"""What the CPU backend costs beside the alternatives: `python -m bench cpu` (at most 3 minutes on two cores).

Sections: "layer", one layer, forward + backward; "decode", 32 rows of 32 tasks in one inference call; "training", a
training step of a small model against stock PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .layers.layer import LayerWork
from .layers.problem import Case
from .layers.providers import PROVIDERS, find
from .models.training import MODELS, training_work
from .report.rows import BOTH, EAGER, FORWARD, RESULTS
from .report.targets import CPU_TARGETS, FUSED
from .run import Work, checked, choose, measure

SECTIONS = ("layer", "decode", "training")
LAYER = (
    "frozen", "fused", "hoisted", "hoisted compiled", "authors' loop", "grouped by task", "PEFT LoRA", "PEFT Poly",
    "HydraLoRA", "grouped_mm multi-LoRA", "Unsloth-style addmm",
)  # fmt: skip
DECODE = ("frozen", "fused", "hoisted", "grouped by task", "PEFT mixed batch", "grouped_mm multi-LoRA")


def works(sections: list[str], names: list[str], shape: dict[str, int]) -> list[Work]:
    chosen: list[Work] = []
    if "layer" in sections:
        providers = find(set(LAYER) & set(names))
        for routing in ("soft", "task"):
            case = Case(f"layer {routing}", routing, **shape)  # type: ignore[arg-type]  # the letters are numbers
            chosen.append(LayerWork(case, providers, [BOTH]))
    if "decode" in sections:
        providers = find(set(DECODE) & set(names))
        for size in (768, 2048):
            case = Case(f"decode {size}", "task", m=32, k=size, n=size, e=32, layout="rows")
            chosen.append(LayerWork(case, providers, [FORWARD], repeats=2))  # a call takes a tenth of a layer's
    models = [name for name in MODELS if name in names]
    if "training" in sections and models:
        chosen.append(training_work(models))
    return chosen


def main(
    section: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(SECTIONS)}; repeatable")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="measure these only; repeatable")] = None,
    m: Annotated[int, typer.Option(help="section layer: tokens, a multiple of 16")] = 512,
    k: Annotated[int, typer.Option(help="section layer: in_features")] = 768,
    n: Annotated[int, typer.Option(help="section layer: out_features")] = 768,
    e: Annotated[int, typer.Option(help="section layer: experts or tasks")] = 8,
    r: Annotated[int, typer.Option(help="section layer: rank")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 60,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    out: Annotated[Path, typer.Option(help="rows are appended to this CSV")] = RESULTS / "cpu.csv",
) -> None:
    """The CPU backend beside the alternatives: a layer, mixed decoding, a training step (at most 3 minutes)."""
    known = [name for name in dict.fromkeys((*PROVIDERS, *MODELS)) if name in {*LAYER, *DECODE, *MODELS}]
    names = choose("provider", provider, known)
    shape = {"m": m, "k": k, "n": n, "e": e, "r": r}
    chosen = checked("--m/--k/--n/--e/--r", works, choose("section", section, SECTIONS), names, shape)
    torch.set_num_threads(threads)
    measure("cpu", "cpu", chosen, [EAGER], out=out, repeats=repeats, denominator=FUSED, targets=CPU_TARGETS)
