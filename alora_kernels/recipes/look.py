"""What a recipe's data is before anything trains: rows, lengths, labels and some rows as training sees them.

For `alora data`. Tasks are read and encoded as for training; of the model its tokenizer is read, never its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from rich.markup import escape
from rich.text import Text

from .. import data
from ..text import clipped, did_you_mean, listed, percent, percentile, printable
from . import display
from .job import label_words, max_length, read
from .recipe import Recipe

Piece = tuple[str, bool]  # a stretch of a row's text, and whether it is learnt
LABELS = 12  # of a task
LONGEST = 1200  # characters of a piece of a row


def look(recipe: Recipe, rows: int = 3, task: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Every task of a recipe, or one of them, each with so many training rows; and lines about what rows lose.

    A ValueError for an unknown task, and for all that training would refuse in the data.
    """
    lost = data.Lost()
    text = read(recipe, lost)
    names = list(dict.fromkeys(text["train"]["task"]))
    if task is not None and task not in names:
        raise ValueError(f"--task {task}: no such task has rows; {did_you_mean(task, names)}")
    with display.err.status("counting tokens ..."):
        tokenizer = data.load_tokenizer(recipe.model)
        length = max_length(recipe, tokenizer)
        encode = partial(data.encode, tokenizer=tokenizer, chat_template=recipe.chat_template)
        sizes = {split: [*map(len, encode(part, lost=lost)["input_ids"])] for split, part in text.items()}
        data.encode_splits(text, tokenizer, length, chat_template=recipe.chat_template)  # refuses what training would
    found = []
    for name in sorted(names) if task is None else [task]:
        own = {split: [at for at, of in enumerate(part["task"]) if of == name] for split, part in text.items()}
        counts = sorted(sizes[split][at] for split, places in own.items() for at in places)
        train, chats = text["train"].select(own["train"]), bool(text["train"][own["train"][0]]["messages"])
        shown = [at for at in own["train"] if not chats or sizes["train"][at] <= length][:rows]
        answers = Counter(train["answer"]) if name in label_words(text, recipe.tasks) else None
        if answers and not chats:
            data.word_tokens(answers, tokenizer, train[0]["prompt"])  # refuses those that no model could tell apart
        about = {
            "task": name,
            "rows": {split: len(places) for split, places in own.items()},
            "tokens": {"p50": percentile(counts, 0.5), "p95": percentile(counts, 0.95), "longest": counts[-1]},
            "max_length": length,
            "too_long": sum(count > length for count in counts),  # chats are left out, prompts lose their middle
            "chats": chats,
            "repeated": lost.repeated[name],  # left out, their prompt is there already
            "contradicting": lost.contradicting[name],  # those of them with another answer
            "labels": {answer: count / len(train) for answer, count in answers.most_common()} if answers else None,
            "samples": [_pieces(row, tokenizer) for row in encode(text["train"].select(shown), max_length=length)],
        }
        found.append(about)
    head = ["streaming: of each entry of tasks its first rows alone were looked at"] if recipe.streaming else []
    return found, head + lost.lines()


def _pieces(row: dict[str, Any], tokenizer: Any) -> list[Piece]:
    """A row's text, divided where what is learnt begins or ends."""
    pieces, before, end = [], "", 0
    for learnt, labels in groupby(row["labels"], key=lambda label: label != data.IGNORE):
        end += len(list(labels))  # a piece alone would lose spaces
        text = tokenizer.decode(row["input_ids"][:end], clean_up_tokenization_spaces=False)
        pieces.append((text[len(before) :], learnt))
        before = text
    return pieces


def show(tasks: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    """Print what `look` found: a table, the shares of answers, what rows lose, and the rows."""
    table = []
    for task in tasks:
        too_long = f"{task['too_long']} {'left out' if task['chats'] else 'cut'}" if task["too_long"] else "0"
        repeated = f"{task['repeated']} ({task['contradicting']})" if task["contradicting"] else str(task["repeated"])
        numbers = map(str, [*task["rows"].values(), *task["tokens"].values()])
        table.append([escape(printable(task["task"])), *numbers, too_long, repeated])
    title = f"rows and their tokens, of which max_length allows {tasks[0]['max_length']}"
    caption = "repeated: prompts that were there already (of these with another answer)"
    columns = ("task", *(split[:5] for split in tasks[0]["rows"]), *tasks[0]["tokens"], "too long", "repeated")
    display.console.print(display.table(title, columns, table, caption))
    for task in tasks:
        labels = [f"{printable(label, 40)} {percent(share)}" for label, share in (task["labels"] or {}).items()]
        display.say(f"{printable(task['task'])} answers: {listed(labels, LABELS) or 'texts'}")
    for line in lines:
        display.say(line, "dim")
    for task in tasks:
        for number, pieces in enumerate(task["samples"], start=1):
            display.say(f"\n{printable(task['task'])}, training row {number}", "bold")
            display.console.print(_marked(pieces), soft_wrap=True, highlight=False)


def _marked(pieces: Sequence[Piece]) -> Text:
    """A row's text on lines of its own, what is learnt in green or, where there are no colours, in brackets."""
    plain, text = display.console.color_system is None, Text()
    for piece, learnt in pieces:
        shown = "\n".join(printable(line) for line in clipped(piece, LONGEST).split("\n"))
        text.append(f"[[{shown}]]" if learnt and plain else shown, "green" if learnt else None)
    return text
