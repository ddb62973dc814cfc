"""One layer on the CPU, forward + backward, beside the alternatives: `python -m bench cpu`.

In:   the shape of the layer (defaults: E = 8, R = 16, M = 512, K = N = 768, float32).
Out:  a table of p20/p50/p80 and the ratio of each alternative to the fused op, for both routings.
Who:  people, and the README's figures.

Every alternative must first give the reference's values and gradients (float64); a wrong one is reported as
wrong and not timed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import alora_kernels
from alora_kernels import baselines, reference

from .timing import interleaved

Layer = Callable[..., Tensor]
PROVIDERS: dict[str, dict[str, Layer]] = {
    "soft": {
        "fused (torch backend)": alora_kernels.alora_linear,
        "hoisted eager": baselines.hoisted,
        "authors' loop": baselines.authors_loop,
    },
    "task": {
        "fused (torch backend)": alora_kernels.alora_linear,
        "hoisted eager": baselines.hoisted,
        "grouped by task, eager": baselines.grouped_by_task,
        "authors' loop": baselines.authors_loop,
    },
}


class Case:
    """One layer's tensors and the two things done with them: compute gradients, and check them."""

    def __init__(self, routing: str, m: int, k: int, n: int, e: int, r: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        batch = 16
        self.weight = torch.randn(n, k, dtype=dtype) / k**0.5
        self.leaves = [
            torch.randn(batch, m // batch, k, dtype=dtype),
            torch.randn(e, r, k, dtype=dtype) / k**0.5,
            torch.randn(n, r, dtype=dtype) / r**0.5,
        ]
        self.options: dict[str, Tensor] = {}
        if routing == "soft":
            self.leaves.append(torch.randn(e, k, dtype=dtype) / k**0.5)
        else:
            self.options["task_ids"] = torch.arange(batch) % e
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.dy = torch.randn(batch, m // batch, n, dtype=dtype)

    def step(self, layer: Layer) -> list[Tensor]:
        """Output and gradients."""
        options = dict(self.options)
        if len(self.leaves) == 4:
            options["router"] = self.leaves[3]
        y = layer(self.leaves[0], self.weight, *self.leaves[1:3], scaling=2.0, **options)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]

    def wide(self) -> Case:
        """The same case in float64."""
        other = object.__new__(Case)
        other.weight, other.dy, other.options = self.weight.double(), self.dy.double(), self.options
        other.leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return other


def worst_error(got: list[Tensor], truth: list[Tensor]) -> float:
    """Largest error of any value or gradient, relative to that tensor's largest entry."""
    return max(
        float((g.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)) for g, t in zip(got, truth, strict=True)
    )


def main(
    m: Annotated[int, typer.Option(help="tokens, a multiple of 16")] = 512,
    k: Annotated[int, typer.Option(help="in_features")] = 768,
    n: Annotated[int, typer.Option(help="out_features")] = 768,
    e: Annotated[int, typer.Option(help="experts or tasks")] = 8,
    r: Annotated[int, typer.Option(help="rank")] = 16,
    repeats: Annotated[int, typer.Option(help="interleaved rounds")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """One layer on the CPU, forward + backward, against the eager alternatives (about 10 s)."""
    if m < 16 or m % 16:
        raise typer.BadParameter(f"m must be a multiple of 16 (a batch of 16 rows), got {m}")
    torch.set_num_threads(threads)
    console = Console()
    for routing, providers in PROVIDERS.items():
        case = Case(routing, m, k, n, e, r, torch.float32)
        truth = case.wide().step(reference.alora_linear)
        errors = {name: worst_error(case.step(layer), truth) for name, layer in providers.items()}
        right = {name: layer for name, layer in providers.items() if errors[name] < 1e-4}
        times = interleaved({name: partial(case.step, layer) for name, layer in right.items()}, repeats=repeats)
        fused = times["fused (torch backend)"].p50
        table = Table(
            title=f"{routing} routing, forward + backward: E={e} R={r} M={m} K={k} N={n} float32, {threads} threads",
            caption=f"{platform.machine()}, torch {torch.__version__}, p50 of {repeats} interleaved runs",
        )
        for column in ("provider", "p20 ms", "p50 ms", "p80 ms", "p50 / fused", "worst rel. error vs float64"):
            table.add_column(column, justify="left" if column == "provider" else "right")
        for name in providers:
            if name not in times:
                table.add_row(name, "wrong", "not timed", "", "", f"{errors[name]:.1e}")
                continue
            t = times[name]
            cells = (f"{1e3 * v:.2f}" for v in (t.p20, t.p50, t.p80))
            table.add_row(name, *cells, f"{t.p50 / fused:.2f}", f"{errors[name]:.1e}")
        console.print(table)
