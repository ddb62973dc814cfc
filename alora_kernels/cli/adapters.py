"""`alora export`, `import` and `verify`: from one ALoRA adapter to stock LoRA folders and back, and are they whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..dtypes import DTYPE_NAMES
from ..recipes import display
from ..recipes.display import say
from ..text import counted, listed, size
from . import command, dtype_of

if TYPE_CHECKING:
    from ..adapters.export import ExportReport
    from ..adapters.import_lora import ImportReport

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
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPE_NAMES)}; default: the adapter's own")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace adapters that are there")] = False,
) -> None:
    """Write each task as a stock LoRA folder, for PEFT, vLLM, SGLang and all that read LoRA.

    Loading them needs nothing of this package, and the answers stay the same. Soft routing has no such form: refused.
    """
    with command():
        from ..adapters.export import export_lora as export

        form = dtype_of(dtype) if dtype else None
        report = export(adapter, out, tasks=_tasks(task), rank=rank, dtype=form, overwrite=overwrite)
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
    dtype: Annotated[str, typer.Option(help=f"of the file: {', '.join(DTYPE_NAMES)}")] = "float32",
    report: Annotated[Path | None, typer.Option(help="CSV with the error of every module and task")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an adapter that is there")] = False,
) -> None:
    """Make one ALoRA adapter of several stock LoRAs, with the best shared B, and say what it loses.

    Trained apart they do not share a B: the output says which rank loses 10 % and which 1 %.

    LoRAs that `alora export` wrote come back exactly.
    """
    with command():
        from ..adapters.import_lora import import_lora as merge

        made = merge(adapters, out, rank=rank, names=name, overwrite=overwrite, dtype=dtype_of(dtype))
        if report is not None:
            made.save(report)
    show_import(made, counted(len(made.tasks), "LoRA"))
    if report is not None:
        say(f"every module and task: {report}")


def verify(adapter: Annotated[Path, typer.Argument(help="an adapter folder, ALoRA or stock LoRA")]) -> None:
    """Read every number of an adapter: exit code 0 if the folder is whole, 2 with the reason if it is not.

    Folders that this package wrote carry a SHA-256 of each tensor; others are checked for shape and finite numbers.
    """
    with command():
        from ..adapters.reader import read_adapter

        file = read_adapter(adapter)
    kind = "ALoRA" if file.config.kind == "alora" else "stock LoRA"
    dtype = str(file.dtype).removeprefix("torch.")
    say(f"{kind} adapter for {file.base or 'a base that it does not name'}")
    say(f"{counted(len(file.tasks), 'task')}: {listed(file.tasks, 8)}")
    say(f"{counted(len(file.shapes), 'module')}, rank {file.rank}, {dtype}, {size(file.stamp.bytes)}")
    tensors = counted(sum(map(len, file.keys.values())), "tensor")
    said = "as written, by SHA-256" if file.sums else "finite; it has no checksums (save it again to add them)"
    say(f"{tensors}: {said}")


def _tasks(given: Sequence[str] | None) -> dict[str, str] | None:
    """Task -> folder name of `--task TASK` and `--task TASK=NAME`."""
    pairs = [text.rpartition("=") if "=" in text else (text, "", text) for text in given or ()]
    return {task: name for task, _, name in pairs} or None


def _lost(error: float) -> str:
    """A relative error in percent."""
    return "exact" if error < EXACT else f"{100 * error:.2f} %"


def _show_export(report: ExportReport) -> None:
    rows = [(name, str(rank), size(count)) for name, _, rank, count in report.table()]
    total = size(sum(task.bytes for task in report.tasks))
    say(f"{counted(len(rows), 'stock LoRA folder')} in {report.tasks[0].folder.parent}", "italic")
    display.console.print(display.table("", ["task", "rank", "size"], rows))
    say(f"{report.modules} adapted modules each, {total} in all", "dim")
    if report.base is None:
        say("The adapter does not name its base model: put it in the place of BASE_MODEL.", "yellow")
    if report.dtype is None:
        say("Its dtype is not known here: both servers make 16 bits of a float32 base without --dtype.", "yellow")
    if report.sglang_command is None:
        say(
            "\nStock PEFT loads them, by its target_parameters; no server was tried with adapters of experts.", "yellow"
        )
        return
    if report.vllm_command is None:
        say(f"\nvLLM serves ranks up to 512; this is {report.rank}: no command for it.", "yellow")
    else:
        say("\n# vLLM", "dim")
        say(report.vllm_command)
    say("\n# SGLang", "dim")
    say(report.sglang_command)


def show_import(report: ImportReport, what: str) -> None:
    """What was put under one B, and what that loses."""
    rows = [(task, str(rank), _lost(error)) for task, rank, error in report.table()]
    rows.append(("[bold]all[/bold]", "", f"[bold]{_lost(report.error)}[/bold]"))
    say(f"{what} as one adapter with one B of rank {report.rank}", "italic")
    display.console.print(display.table("", ["task", "its rank", "weight change lost"], rows))
    say(f"{size(report.bytes_before)} before, {size(report.bytes)} now", "dim")
    if report.error >= EXACT:
        worst = [(module, _lost(error)) for module, error in report.worst()]
        say("\nthe modules that lose most", "italic")
        display.console.print(display.table("", ["module", "lost"], worst))
        for goal, r in sorted(report.needed.items(), reverse=True):
            fits = size(report.bytes * r // report.rank)
            say(f"--rank {r} ({fits}) is the smallest that loses at most {100 * goal:.0f} % over all")
    for task, modules in report.missing.items():
        some = ", ".join(modules[:3]) + (" ..." if len(modules) > 3 else "")
        say(f"{task} has no adapter at {counted(len(modules), 'module')} and leaves the base there: {some}", "yellow")
    say(f"adapter saved: {report.folder}")
