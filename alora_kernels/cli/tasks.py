"""`alora tasks`: what tasks a saved adapter has, and how they come and go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..recipes import display
from ..recipes.display import say
from ..text import clipped, counted, printable
from . import command
from .adapters import show_import

WIDE = 48  # characters of a template in the table
COMMANDS = ("list", "add", "remove", "rename", "join")

app = typer.Typer(
    help="List, add, remove, rename or join the tasks of a saved adapter; the base model is not loaded.\n\n"
    "A change needs --out, another folder, or --overwrite, which changes DIR itself.",
    epilog="For example: alora tasks runs/alora/adapter add law --like trec --overwrite",
)

Out = Annotated[Path | None, typer.Option(help="folder for the changed adapter; DIR stays as it is")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="change DIR itself, or replace the adapter in --out")]


@app.callback(invoke_without_command=True)
def folder(
    context: typer.Context,
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="an ALoRA adapter, such as runs/alora/adapter")],
) -> None:
    """See `app`."""
    context.obj = adapter
    if context.invoked_subcommand is None:
        show(context)


@app.command("list")
def show(context: typer.Context) -> None:
    """Show how each task is asked, how much it changes the weights, and which other one does so most alike."""
    with command():
        from rich.markup import escape

        from ..adapters.tasks import list_tasks

        if not context.obj.exists() and str(context.obj) in COMMANDS:
            raise ValueError(f"the folder comes first: alora tasks DIR {context.obj} ...")
        rows = []
        for number, task in enumerate(list_tasks(context.obj)):
            near = max(task.alike, key=lambda other: task.alike[other], default=None)
            asked = "chat" if task.card and task.card.chat else (task.card and task.card.template) or "not known"
            texts = [task.name, clipped(json.dumps(asked, ensure_ascii=False)[1:-1], WIDE)]
            alike = f"{near} {task.alike[near]:.2f}" if near else ""
            rows.append(
                [*(escape(printable(t)) for t in texts), str(number), f"{task.norm:.3g}", escape(printable(alike))]
            )
        said = "change: the norm of s B A over all modules; most like: the cosine of two changes"
        columns = ["task", "asked", "id", "change", "most like"]
        display.console.print(display.table(str(context.obj), columns, rows, said, left=2))


@app.command()
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="of the new task")],
    like: Annotated[str | None, typer.Option(help="begin with the A of this task; default: a random A")] = None,
    seed: Annotated[int, typer.Option(help="of the random A")] = 0,
    template: Annotated[
        str | None, typer.Option(help="how the task will be asked, such as 'Review: {text}\\nSentiment:'")
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Add a task, to be trained by `alora train RECIPE --from DIR --train-tasks NAME`."""
    with command():
        from ..adapters.cards import TaskCard

        cards = {} if template is None else {name: TaskCard(template=template.replace("\\n", "\n"))}
        _arrange(context.obj, {}, {name: like}, out, overwrite, seed=seed, cards=cards)
        start = (
            "with a random A: it answers badly until" if like is None else f"with the A of {like}: it answers so until"
        )
        say(f"{name} begins {start} it is trained", "yellow")


@app.command()
def remove(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="tasks to take out")],
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Take tasks out; the others stay as they are, to the bit."""
    with command():
        _arrange(context.obj, dict.fromkeys(names), {}, out, overwrite)


@app.command()
def rename(
    context: typer.Context,
    old: Annotated[str, typer.Argument(help="what the task is called")],
    new: Annotated[str, typer.Argument(help="what it shall be called")],
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Call a task otherwise; its numbers stay as they are."""
    with command():
        _arrange(context.obj, {old: new}, {}, out, overwrite)


@app.command()
def join(
    context: typer.Context,
    other: Annotated[Path, typer.Argument(help="another ALoRA adapter on the same base, or a stock LoRA")],
    rank: Annotated[
        int | None, typer.Option(help="of the best shared B; default: the sum of both ranks, which is exact", min=1)
    ] = None,
    prefix: Annotated[str, typer.Option(help="put before the names of OTHER's tasks")] = "",
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Add all tasks of another adapter, under one B; it says what each task loses."""
    with command():
        from ..adapters.tasks import join_adapters

        report = join_adapters(context.obj, other, rank=rank, prefix=prefix, out=out, overwrite=overwrite)
    show_import(report, counted(len(report.tasks), "task"))


def _arrange(
    folder: Path,
    changed: dict[str, str | None],
    more: dict[str, str | None],
    out: Path | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Arrange the tasks anew: old names by new ones, None for those that go, and more of them behind."""
    from ..adapters.tasks import arrange_tasks, check_known, read_tasks

    file = read_tasks(folder)
    check_known(file, changed)
    names = [(changed.get(task, task), task) for task in file.tasks]
    pairs = [(new, task) for new, task in names if new is not None] + list(more.items())
    if twice := [new for new in [*changed.values(), *more] if new in file.tasks]:
        raise ValueError(f"{folder} has a task {twice[0]!r} already: choose another name")
    if not pairs:
        raise ValueError(f"{folder} would have no task left: delete the folder if that is meant")
    written = arrange_tasks(file, dict(pairs), out=out, overwrite=overwrite, **options)
    say(f"adapter saved: {written}, {counted(len(pairs), 'task')}: {', '.join(new for new, _ in pairs)}")
