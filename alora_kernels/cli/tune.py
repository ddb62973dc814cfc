"""`alora tune`: prove every plan on this GPU, measure plans and tiles, keep a table that the kernels read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..recipes import display
from ..recipes.display import say
from ..text import counted
from . import command

if TYPE_CHECKING:
    import torch

    from ..tuning.run import Tuner

INTERRUPTED = 130  # what a shell reports for Ctrl-C
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """ "90", "90s", "2m" or "1h" in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found or float(found[1]) == 0:
        raise ValueError(f"--budget must be a time such as 120, 120s or 2m, got {text!r}")
    return float(found[1]) * UNITS[found[2]]


def gpu_of(name: str) -> torch.device:
    """The GPU that `--device` names, which the kernels serve."""
    import torch

    from ..ops.dispatch import explain, interpreting

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError("no CUDA or ROCm device here. The torch backend serves, and there is nothing to tune in it")
    if interpreting():
        raise ValueError("TRITON_INTERPRET is set: only compiled kernels can be tuned")
    index = re.fullmatch(r"(?:cuda:?)?(\d*)", name)
    if not index or int(index[1] or 0) >= count:
        raise ValueError(f"--device must be one of {', '.join(f'cuda:{i}' for i in range(count))}, got {name!r}")
    device = torch.device("cuda", int(index[1] or 0))
    explain(device, "triton")  # refuses what the kernels cannot serve
    return device


def tune(
    model: Annotated[
        str | None, typer.Argument(help="tune for the layers of this one: a folder or hub id, only its config is read")
    ] = None,
    tasks: Annotated[int, typer.Option(help="tasks or experts of a layer", min=1)] = 8,
    rank: Annotated[int, typer.Option(help="rank of a layer", min=1)] = 16,
    budget: Annotated[
        str | None, typer.Option(help="stop after this long, such as 120s or 2m; the next run goes on from there")
    ] = None,
    device: Annotated[str, typer.Option(help="which GPU")] = "cuda:0",
    repeats: Annotated[int, typer.Option(help="runs of the one-pass kernels on changing inputs", min=1)] = 2000,
    again: Annotated[bool, typer.Option("--again", help="forget what was measured on this chip")] = False,
) -> None:
    """Prove every plan on this GPU, then measure plans and tiles.

    What was found is kept for this user, chip, driver and versions; the kernels read it, `alora doctor` shows it.
    """
    with command():
        limit = math.inf if budget is None else seconds_of(budget)
        place = gpu_of(device)
        import torch

        from ..kernels.tuned import NEVER, Table, identity, path_of, read
        from ..tuning.gpu import Gpu
        from ..tuning.run import STANDARD, Shape, Tuner, shapes_of

        key = identity(place)
        assert key is not None
        table, why = read(key)
        if table is None and why != NEVER:
            say(f"{key['chip']}: {why}; measuring anew", "yellow")
        shapes: Sequence[Shape] = STANDARD
        if model is not None:
            from ..data.models import layer_shapes  # a bare GPU machine has no `datasets`

            shapes = shapes_of(layer_shapes(model))
        fresh = Table(key) if table is None or again else table
        try:
            fresh.save()
        except OSError as error:
            raise ValueError(f"no table can be kept ({error}): set XDG_CACHE_HOME to a folder of yours") from error
        with torch.cuda.device(place):
            gpu = Gpu(place)
            tuner = Tuner(fresh, shapes, gpu, tasks, rank, repeats, gpu.now() + limit)
            ended = _run(tuner)
    _show(tuner)
    say(f"kept in {path_of(key)}")
    if ended:
        say(ended[0], "yellow")
        raise typer.Exit(ended[1])


def _run(tuner: Tuner) -> tuple[str, int] | None:
    """Run under a bar; the words and the exit code of an early end."""
    from ..kernels.tuned import OK
    from ..tuning.run import DeviceLostError

    done = 0
    with display.progress("ideas") as bar:
        task = bar.add_task("tuning", total=None, note="")

        def tell(idea: str, left: int) -> None:
            nonlocal done
            bar.update(task, completed=done, total=done + left, note=idea)
            done += 1

        tuner.tell = tell
        try:
            left = tuner.run()
        except KeyboardInterrupt:
            return "interrupted: run it again to go on", INTERRUPTED
        except DeviceLostError as error:
            return f"stopped, the GPU answers no more: {error}. Run it again to go on without that", 1
        bar.update(task, completed=done, total=done + left, note="")
    if left:
        return f"the budget ended with {counted(left, 'idea')} left: run it again to go on", 0
    if OK not in tuner.table.verdicts.values():
        return "no plan is right here. If the fault is not the chip's, mend it and run `alora tune --again`", 1
    return None


def _show(tuner: Tuner) -> None:
    """What was found."""
    from ..kernels.tuned import OK
    from ..tuning.run import RULE, UNTAKEN

    table, names = tuner.table, {shape.name for shape in tuner.shapes}
    rows = []
    for name, entry in table.plans.items():
        routing, _, shape = name.split("/")
        if entry["plan"] and shape in names:
            forward, dx, overlap = entry["plan"][:3]
            timed = forward + "+overlap" * (overlap and f"{forward}+overlap" in entry["ms"]), RULE
            ms = [f"{entry['ms'][plan]:.4f}" if plan in entry["ms"] else "" for plan in timed]
            rows.append((shape, routing, f"{forward}; dx {dx}" + ", side stream" * overlap, *ms))
    if rows:
        columns = ("shapes", "routing", "plan", "forward ms", f"{RULE} ms")
        display.console.print(display.table(f"plans on {table.key['chip']}", columns, rows, left=3))
    for name, said in table.verdicts.items():
        if said not in (OK, UNTAKEN):
            say(f"never taken: {name}: {said}", "red")
    for name, said in tuner.skipped.items():
        say(f"skipped: {name}: {said}", "yellow")
