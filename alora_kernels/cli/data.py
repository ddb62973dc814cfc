"""`alora data`: rows, lengths and labels of a recipe's tasks, and rows with what is learnt marked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.text import Text

from ..recipes import display
from ..recipes.display import say
from ..text import clipped, percent, printable
from . import command

if TYPE_CHECKING:
    from ..recipes.look import Piece, TaskData

LABELS = 12  # of a task
LONGEST = 1200  # characters of a piece of a row


def data(
    config: Annotated[Path, typer.Argument(help="a recipe of `alora train`")],
    rows: Annotated[int, typer.Option(help="training rows shown of each task", min=0)] = 3,
    task: Annotated[str | None, typer.Option(help="one task alone")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything as JSON on standard output")] = False,
) -> None:
    """Look at a recipe's data before training: rows, lengths, duplicates, labels, and rows as training sees them.

    What is learnt is green on a terminal, and stands in [[ ]] elsewhere. Reads the model's tokenizer, not its weights.
    """
    with command():
        from ..recipes.look import look
        from ..recipes.recipe import load_recipe

        tasks, lines = look(load_recipe(config), rows, task)
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(each) for each in tasks], indent=1, ensure_ascii=False))
            return
        _show(tasks)
        for line in lines:
            say(line, "dim")
        for each in tasks:
            for number, pieces in enumerate(each.samples, start=1):
                say(f"\n{printable(each.task)}, training row {number}", "bold")
                display.console.print(_marked(pieces), soft_wrap=True, highlight=False)


def _show(tasks: list[TaskData]) -> None:
    splits, counts = list(tasks[0].rows), ("p50", "p95", "longest")
    table = []
    for each in tasks:
        numbers = [each.rows[split] for split in splits] + [each.tokens[name] for name in counts]
        too_long = f"{each.too_long} {'left out' if each.chats else 'cut'}" if each.too_long else "0"
        repeated = f"{each.repeated} ({each.contradicting})" if each.contradicting else str(each.repeated)
        table.append([escape(printable(each.task)), *map(str, numbers), too_long, repeated])
    title = f"rows and their tokens, of which max_length allows {tasks[0].max_length}"
    caption = "repeated: prompts that were there already (of these with another answer)"
    columns = ("task", *(split[:5] for split in splits), *counts, "too long", "repeated")
    display.console.print(display.table(title, columns, table, caption))
    for each in tasks:
        shares = [
            f"{printable(label, 40)} {percent(share)}" for label, share in list((each.labels or {}).items())[:LABELS]
        ]
        more = len(each.labels or ()) - len(shares)
        say(f"{printable(each.task)} answers: {', '.join(shares) or 'texts'}{f' and {more} more' if more else ''}")


def _marked(pieces: list[Piece]) -> Text:
    """A row's text on lines of its own, what is learnt in green or, where there are no colours, in brackets."""
    plain, text = display.console.color_system is None, Text()
    for piece, learnt in pieces:
        shown = "\n".join(printable(line) for line in clipped(piece, LONGEST).split("\n"))
        text.append(f"[[{shown}]]" if learnt and plain else shown, "green" if learnt else None)
    return text
