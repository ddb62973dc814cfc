"""`python -m bench moe`: a training step over a mixture's experts beside stock PEFT's `target_parameters`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .models.experts import MODELS, SIZES, default_work
from .models.pair import FUSED
from .report.rows import EAGER, RESULTS
from .report.targets import MOE_TARGETS
from .run import checked, choose, measure

ELSEWHERE = Path("runs") / "bench-moe.csv"


def main(
    provider: Annotated[list[str] | None, typer.Option(help="measure these only; repeatable")] = None,
    width: Annotated[int, typer.Option(min=16, help="hidden size, a multiple of 16")] = SIZES["width"],
    inside: Annotated[int, typer.Option(min=1, help="width of an expert")] = SIZES["inside"],
    experts: Annotated[int, typer.Option(min=1, help="experts per layer")] = SIZES["experts"],
    top: Annotated[int, typer.Option(min=1, help="experts per token")] = SIZES["top"],
    layers: Annotated[int, typer.Option(min=1, help="decoder layers")] = SIZES["layers"],
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    out: Annotated[
        Path | None,
        typer.Option(help=f"rows are appended to this CSV; default that of the docs, of other sizes {ELSEWHERE}"),
    ] = None,
) -> None:
    """A training step over experts, 8 tasks mixed, beside stock PEFT and attention alone (about two minutes)."""
    sizes = {"width": width, "experts": experts, "layers": layers, "top": top, "inside": inside}
    usual = sizes == SIZES
    work = checked("--width/--top", default_work, choose("provider", provider, MODELS), sizes)
    torch.set_num_threads(threads)
    measure(
        "moe", "cpu", [work], [EAGER], out=out or (RESULTS / "moe.csv" if usual else ELSEWHERE), repeats=repeats,
        denominator=FUSED, targets=MOE_TARGETS if usual else (),
    )  # fmt: skip
