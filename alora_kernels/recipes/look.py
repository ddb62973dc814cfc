"""What a recipe's data is before anything trains: rows, lengths, labels and some rows as training sees them.

For `alora data`. Tasks are read and encoded as for training; of the model its tokenizer is read, never its weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from .. import data
from ..text import did_you_mean, percentile
from . import display
from .job import label_words, max_length, read
from .recipe import Recipe

Piece = tuple[str, bool]  # a stretch of a row's text, and whether it is learnt


@dataclass(frozen=True)
class TaskData:
    """One task of a recipe in numbers and examples."""

    task: str
    rows: dict[str, int]  # by split
    tokens: dict[str, int]  # p50, p95 and longest of all rows, before any is cut
    max_length: int
    too_long: int  # rows above max_length: of a chat task they are left out, prompts lose their middle
    chats: bool
    repeated: int  # rows left out, their prompt is there already
    contradicting: int  # those of them with another answer
    labels: dict[str, float] | None  # shares of the answers in training; None of texts
    samples: list[list[Piece]]


def look(recipe: Recipe, rows: int = 3, task: str | None = None) -> tuple[list[TaskData], list[str]]:
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
        found.append(
            TaskData(
                name,
                {split: len(places) for split, places in own.items()},
                {"p50": int(percentile(counts, 0.5)), "p95": int(percentile(counts, 0.95)), "longest": counts[-1]},
                length,
                sum(count > length for count in counts),
                chats,
                lost.repeated[name],
                lost.contradicting[name],
                {answer: count / len(train) for answer, count in answers.most_common()} if answers else None,
                [_pieces(row, tokenizer) for row in encode(text["train"].select(shown), max_length=length)],
            )
        )
    head = ["streaming: of each entry of tasks its first rows alone were looked at"] if recipe.streaming else []
    return found, head + lost.lines()


def _pieces(row: dict[str, Any], tokenizer: Any) -> list[Piece]:
    """A row's text, divided where what is learnt begins or ends."""
    pieces, before, end = [], "", 0
    for learnt, labels in groupby(row["labels"], key=lambda label: label != data.IGNORE):
        end += len(list(labels))
        text = tokenizer.decode(
            row["input_ids"][:end], clean_up_tokenization_spaces=False
        )  # a piece alone loses spaces
        pieces.append((text[len(before) :], learnt))
        before = text
    return pieces
