"""`alora tasks`: what tasks a saved adapter has, and how they come and go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..recipes import display
from ..recipes.display import say
from ..text import clipped, counted, listed, printable, size
from . import command
from .adapters import show_import

WIDE = 48  # characters of a template in the table

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
    """Show the tasks: size, how much each changes the weights, which other one is most like it, how it is asked."""
    with command():
        from ..adapters.tasks import list_tasks

        if not context.obj.exists() and str(context.obj) in COMMANDS:
            raise ValueError(f"the folder comes first: alora tasks DIR {context.obj} ...")
        from rich.markup import escape

        rows = []
        for number, task in enumerate(list_tasks(context.obj)):
            near = f"{printable(task.nearest)} {task.alike[task.nearest]:.2f}" if task.nearest else ""
            asked = "chat" if task.card and task.card.chat else (task.card and task.card.template) or "not known"
            told = [printable(task.name), clipped(json.dumps(asked, ensure_ascii=False)[1:-1], WIDE), near]
            name, asked, near = map(escape, told)
            rows.append([name, asked, str(number), str(task.rank), size(task.bytes), f"{task.norm:.3g}", near])
        columns = ["task", "asked", "id", "rank", "size of A", "change", "most like"]
        said = "change: the norm of s B A over all modules; most like: the cosine of two changes"
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
        from ..adapters.tasks import add_task

        card = None if template is None else TaskCard(template=template.replace("\\n", "\n"))
        written = add_task(context.obj, name, like=like, seed=seed, card=card, out=out, overwrite=overwrite)
        say(
            f"{name} begins with {'a random A' if like is None else f'the A of {like}'} and is not trained yet",
            "yellow",
        )
        _saved(written)


@app.command()
def remove(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="tasks to take out")],
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Take tasks out; the others stay as they are, to the bit."""
    with command():
        from ..adapters.tasks import remove_tasks

        _saved(remove_tasks(context.obj, names, out=out, overwrite=overwrite))


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
        from ..adapters.tasks import rename_task

        _saved(rename_task(context.obj, old, new, out=out, overwrite=overwrite))


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


def _saved(written: Path) -> None:
    from ..adapters.reader import read_adapter

    tasks = read_adapter(written).tasks
    say(f"adapter saved: {written}, {counted(len(tasks), 'task')}: {listed(tasks, 20)}")


COMMANDS = ("list", "add", "remove", "rename", "join")
