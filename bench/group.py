"""Projections that read the same x, in one op or one by one: `python -m bench group` (about a minute).

In:   shapes of q/k/v and gate/up, both routings, the CPU.
Out:  a table: forward + backward one by one over the same as a group.
Who:  people; LOG.md says what follows from it for the tuner.

The group must first give the values and gradients of the single ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor

from alora_kernels import Routing, alora_linear, alora_linear_group

from . import tables
from .machine import this_run
from .timing import Timing, interleaved

SIBLINGS = {
    "q/k/v, 768": (768, (768, 768, 768)),
    "q/k/v, SmolLM2-135M": (576, (576, 192, 192)),
    "gate/up, SmolLM2-135M": (576, (1536, 1536)),
}
R, E, S = 16, 8, 2.0
Steps = dict[str, Callable[[], list[Tensor]]]


def steps(m: int, k: int, widths: tuple[int, ...], routing: str) -> Steps:
    """Forward and backward of the members, one by one and as a group: outputs, then gradients."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).requires_grad_()

    x = torch.randn(m, k, requires_grad=True)
    weights = [draw(n, k).detach() for n in widths]
    a, b = [draw(E, R, k) for _ in widths], [draw(n, R) for n in widths]
    routers = [draw(E, k) for _ in widths] if routing == "soft" else None
    ids = Routing(torch.arange(m) * E // m) if routing == "task" else None
    dys = [torch.randn(m, n) for n in widths]
    leaves = [x, *a, *b, *(routers or [])]

    def backward(ys: list[Tensor]) -> list[Tensor]:
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]

    def singly() -> list[Tensor]:
        own = [routers[i] if routers else None for i in range(len(widths))]
        each = zip(weights, a, b, own, strict=True)
        return backward([alora_linear(x, w, p, q, router=o, task_ids=ids, scaling=S) for w, p, q, o in each])

    def grouped() -> list[Tensor]:
        return backward(list(alora_linear_group(x, weights, a, b, routers=routers, task_ids=ids, scalings=S)))

    return {"one by one": singly, "group": grouped}


def main(
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 60,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """q/k/v and gate/up as one op against one op each, on the CPU."""
    torch.set_num_threads(threads)
    run, console = this_run("group", "cpu"), tables.console()
    table = Table("layers", "routing", "M", "one by one ms", "group ms", "one by one / group")
    table.title = f"siblings, forward + backward, R={R} E={E} float32; {run.device}, torch {run.torch}, {run.commit}"
    for name, (k, widths) in SIBLINGS.items():
        for routing in ("task", "soft"):
            for m in (32, 512):
                both = steps(m, k, widths, routing)
                for one, other in zip(both["one by one"](), both["group"](), strict=True):
                    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
                timed = {n: t for n, t in interleaved(both, repeats=repeats).items() if isinstance(t, Timing)}
                single, group = timed["one by one"].p50, timed["group"].p50
                cells = (m, f"{1e3 * single:.2f}", f"{1e3 * group:.2f}", f"{single / group:.2f}")
                table.add_row(name, routing, *map(str, cells))
    console.print(table)
