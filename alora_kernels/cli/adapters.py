"""`alora export` and `alora import`: from one ALoRA adapter to stock LoRA folders and back.

In:   adapter folders.
Out:  adapter folders; tables of what was written and what it lost, and the commands that serve it elsewhere.
Who:  `app` registers both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..recipes.display import quiet
from .errors import USER_ERRORS, fail

if TYPE_CHECKING:
    import torch

    from ..adapters.export import ExportReport
    from ..adapters.import_lora import ImportReport

DTYPES = ("float32", "bfloat16", "float16")
EXACT = 1e-6  # a loss below that of rounding to float32


def export_lora(
    adapter: Annotated[Path, typer.Argument(help="an ALoRA adapter folder, such as runs/demo/adapter")],
    out: Annotated[Path, typer.Option(help="gets one folder per task")] = Path("exported"),
    task: Annotated[
        list[str] | None,
        typer.Option(help="only this task; again for more. TASK=NAME writes it to the folder NAME", metavar="TASK"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="rank of every folder, filled with zeros; default: the adapter's largest", min=1)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: the adapter's own")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace adapters that are there")] = False,
) -> None:
    """Write each task as a stock LoRA folder, for PEFT, vLLM, SGLang and all that read LoRA.

    Loading them needs nothing of this package, and the answers stay the same. Soft routing has no such form: refused.
    """
    quiet()
    from ..adapters.export import export_lora as export

    try:
        report = export(
            adapter, out, tasks=_tasks(task), rank=rank, dtype=_dtype(dtype) if dtype else None, overwrite=overwrite
        )
    except USER_ERRORS as error:
        raise fail(error) from error
    _show_export(report)


def import_lora(
    adapters: Annotated[list[Path], typer.Argument(help="stock LoRA folders on one base model", metavar="DIR...")],
    out: Annotated[Path, typer.Option(help="folder of the new ALoRA adapter")],
    rank: Annotated[
        int | None, typer.Option(help="rank of the shared B; default: the largest of the originals", min=1)
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="name of a task, once per folder and in order; default: the folders' names")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"of the file: {', '.join(DTYPES)}")] = "float32",
    report: Annotated[Path | None, typer.Option(help="CSV with the error of every module and task")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an adapter that is there")] = False,
) -> None:
    """Make one ALoRA adapter of several stock LoRAs, with the best shared B, and say what it loses.

    Trained apart they do not share a B: the output says which rank loses 10 % and which 1 %.

    LoRAs that `alora export` wrote come back exactly.
    """
    quiet()
    from ..adapters.import_lora import import_lora as merge

    try:
        made = merge(adapters, out, rank=rank, names=name, overwrite=overwrite, dtype=_dtype(dtype))
        if report is not None:
            made.save(report)
    except USER_ERRORS as error:
        raise fail(error) from error
    _show_import(made)
    if report is not None:
        _say(f"every module and task: {report}")


def _tasks(given: Sequence[str] | None) -> dict[str, str] | None:
    """Task -> folder name of `--task TASK` and `--task TASK=NAME`."""
    pairs = [text.rpartition("=") if "=" in text else (text, "", text) for text in given or ()]
    return {task: name for task, _, name in pairs} or None


def _dtype(name: str) -> torch.dtype:
    """A torch dtype by its name.

    Raises:
        ValueError: not one of `DTYPES`.
    """
    import torch

    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _say(text: str, style: str | None = None) -> None:
    """Text as it is: paths and commands are neither wrapped nor coloured by guess, so that they can be copied."""
    from ..recipes import display

    display.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _lost(error: float) -> str:
    """A relative error in percent."""
    return "exact" if error < EXACT else f"{100 * error:.2f} %"


def _show_export(report: ExportReport) -> None:
    from ..recipes import display

    rows = [(name, str(rank), _size(count)) for name, _, rank, count in report.table()]
    total = _size(sum(task.bytes for task in report.tasks))
    _say(f"{_many(len(rows), 'stock LoRA folder')} in {report.tasks[0].folder.parent}", "italic")
    display.console.print(display.table("", ["task", "rank", "size"], rows))
    _say(f"{report.modules} adapted modules each, {total} in all", "dim")
    if report.base is None:
        _say("The adapter does not name its base model: put it in the place of BASE_MODEL.", "yellow")
    if report.dtype is None:
        _say("Its dtype is not known here: both servers make 16 bits of a float32 base without --dtype.", "yellow")
    if report.vllm_command is None:
        _say(f"\nvLLM serves ranks up to 512; this is {report.rank}: no command for it.", "yellow")
    else:
        _say("\n# vLLM", "dim")
        _say(report.vllm_command)
    _say("\n# SGLang", "dim")
    _say(report.sglang_command)


def _show_import(report: ImportReport) -> None:
    from ..recipes import display

    rows = [(task, str(rank), _lost(error)) for task, rank, error in report.table()]
    rows.append(("[bold]all[/bold]", "", f"[bold]{_lost(report.error)}[/bold]"))
    _say(f"{_many(len(report.tasks), 'LoRA')} as one adapter with one B of rank {report.rank}", "italic")
    display.console.print(display.table("", ["task", "its rank", "weight change lost"], rows))
    _say(f"{_size(report.bytes_before)} before, {_size(report.bytes)} now", "dim")
    if report.error >= EXACT:
        worst = [(module, _lost(error)) for module, error in report.worst()]
        _say("\nthe modules that lose most", "italic")
        display.console.print(display.table("", ["module", "lost"], worst))
        for goal, r in sorted(report.needed.items(), reverse=True):
            size = _size(report.bytes * r // report.rank)
            _say(f"--rank {r} ({size}) is the smallest that loses at most {100 * goal:.0f} % over all")
    for task, modules in report.missing.items():
        listed = ", ".join(modules[:3]) + (" ..." if len(modules) > 3 else "")
        _say(f"{task} has no adapter at {_many(len(modules), 'module')} and leaves the base there: {listed}", "yellow")
    _say(f"adapter saved: {report.folder}")
