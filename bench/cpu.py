"""What the CPU backend costs beside the alternatives: `python -m bench cpu` (at most 6 minutes on two cores).

Sections: "layer", one layer, forward + backward; "decode", 32 rows of 32 tasks in one inference call; "training", a
training step of a small model against stock PEFT. On request "demo", the demo's own step, and "memory", the peak of a
step with a large vocabulary (20 GB); both beside another commit of this package, if `--build-venv` says where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .layers.layer import layer_work
from .layers.problem import Case
from .layers.providers import PROVIDERS, find
from .models import build, memory, training
from .models.pair import Setting, model_work
from .report.rows import BOTH, EAGER, FORWARD, RESULTS
from .report.targets import CPU_TARGETS, FUSED, in_dtype
from .run import Work, checked, choose, measure

SECTIONS = ("layer", "decode", "training", "demo", "memory")
USUAL = SECTIONS[:3]
DTYPES = ("float32", "bfloat16")
SHAPE = {"m": 512, "k": 768, "n": 768, "e": 8, "r": 16}  # of section layer
ELSEWHERE = Path("runs") / "bench-cpu.csv"
DEMO = (*training.MODELS, training.PLAIN, build.BUILD)
LAYER = (
    "frozen", "fused", "hoisted", "hoisted compiled", "authors' loop", "grouped by task", "PEFT LoRA", "PEFT Poly",
    "HydraLoRA", "grouped_mm multi-LoRA", "Unsloth-style addmm",
)  # fmt: skip
DECODE = ("frozen", "fused", "hoisted", "grouped by task", "PEFT mixed batch", "grouped_mm multi-LoRA")


def works(
    sections: Sequence[str],
    names: Sequence[str],
    shape: dict[str, int],
    dtypes: Sequence[str] = DTYPES[:1],
    python: Path | None = None,
) -> list[Work]:
    """What the sections measure; `python` finds the package of another commit."""
    chosen: list[Work] = []
    named: dict[str, torch.dtype] = {name: getattr(torch, name) for name in dtypes}
    sizes: Any = shape
    if "layer" in sections:
        providers = find(set(LAYER) & set(names))
        for name, dtype in named.items():
            for routing in ("soft", "task"):
                case = Case(in_dtype(f"layer {routing}", name), routing, **sizes, dtype=dtype)
                chosen.append(layer_work(case, providers, [BOTH]))
    if "decode" in sections:
        providers = find(set(DECODE) & set(names))
        for name, dtype in named.items():
            for size in (768, 2048):
                title = in_dtype(f"decode {size}", name)
                case = Case(title, "task", m=32, k=size, n=size, e=32, dtype=dtype, layout="rows")
                chosen.append(layer_work(case, providers, [FORWARD], 2))  # a call takes a tenth of a layer's
    in_training, in_demo, in_memory = (
        [name for name in models if name in names] for models in (training.MODELS, DEMO, memory.MODELS)
    )
    for s in _settings(training.SMALL, named) if "training" in sections and in_training else ():
        step = training.Training(partial(training.base_model, s.dtype), s)
        chosen.append(model_work(in_training, step, width=576, note=training.smollm_note()))
    if "demo" in sections and in_demo:
        from .models import demo  # it reads the recipe, and with it half of the package

        chosen += demo.demo_works(in_demo, _settings(demo.STEP, named), python)
    if "memory" in sections and in_memory:
        chosen += [memory.memory_work(case, in_memory, python) for case in memory.SHARES]
    return chosen


def _settings(setting: Setting, named: dict[str, torch.dtype]) -> list[Setting]:
    return [replace(setting, case=in_dtype(setting.case, name), dtype=dtype) for name, dtype in named.items()]


def main(
    section: Annotated[
        list[str] | None,
        typer.Option(help=f"one of {', '.join(SECTIONS)}; repeatable; without it {', '.join(USUAL)}"),
    ] = None,
    provider: Annotated[list[str] | None, typer.Option(help="measure these only; repeatable")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join(DTYPES)}; repeatable; both by default")
    ] = None,
    m: Annotated[int, typer.Option(help="section layer: tokens, a multiple of 16")] = SHAPE["m"],
    k: Annotated[int, typer.Option(help="section layer: in_features")] = SHAPE["k"],
    n: Annotated[int, typer.Option(help="section layer: out_features")] = SHAPE["n"],
    e: Annotated[int, typer.Option(help="section layer: experts or tasks")] = SHAPE["e"],
    r: Annotated[int, typer.Option(help="section layer: rank")] = SHAPE["r"],
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 60,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    build_commit: Annotated[
        str, typer.Option("--build", help="demo, memory: the earlier commit to compare with")
    ] = build.COMMIT,
    build_venv: Annotated[
        Path | None, typer.Option(help="demo, memory: folder of its venv, made where it is missing")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help=f"rows are appended to this CSV; default that of the docs, of another layer {ELSEWHERE}"),
    ] = None,
) -> None:
    """The CPU backend beside the alternatives: a layer, mixed decoding, a training step (at most 6 minutes)."""
    known = [name for name in dict.fromkeys((*PROVIDERS, *DEMO)) if name in {*LAYER, *DECODE, *DEMO}]
    names = choose("provider", provider, known)
    shape = {"m": m, "k": k, "n": n, "e": e, "r": r}
    sections, dtypes = choose("section", section or USUAL, SECTIONS), choose("dtype", dtype, DTYPES)
    python = None if build_venv is None else checked("--build", build.install, build_commit, build_venv)
    chosen = checked("--m/--k/--n/--e/--r", works, sections, names, shape, dtypes, python)
    torch.set_num_threads(threads)
    usual = shape == SHAPE  # targets are set, and docs are written, for one layer
    measure(
        "cpu", "cpu", chosen, [EAGER], out=out or (RESULTS / "cpu.csv" if usual else ELSEWHERE), repeats=repeats,
        denominator=FUSED, targets=CPU_TARGETS if usual else (),
    )  # fmt: skip
