"""How often a model picks the right answer word, task by task, on mixed batches.

In:   a model, encoded rows (`input_ids`, `labels`, `task`), and the words each task may answer with.
Out:  accuracy per task.
Who:  the demo and `alora eval`, before and after training.

The row is cut before its answer and the words' first tokens compete: the choice a user of a classifier sees, and
the same question for the untuned base (which rarely says exactly the right word of its own accord).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..routing import route
from .collator import IGNORED, TaskCollator


@torch.no_grad()
def choice_accuracy(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    choices: Mapping[str, Sequence[int]],
    *,
    tasks: Sequence[str] | None,
    pad_token_id: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> dict[str, float]:
    """Share of rows whose answer gets the largest logit among its task's words.

    Args:
        model: a causal language model that knows `logits_to_keep`.
        rows: encoded test rows; the first label that counts is the answer's first token.
        choices: first tokens of the words that each task may answer with.
        tasks: names in the order of the model's ids for task routing; None for a model that takes no ids.
        pad_token_id: fills shorter rows.
        batch_size: rows per forward; rows of similar length share one.
        on_batch: called with the number of rows done, for a progress bar.

    Returns:
        Accuracy by task name, in the order of `choices`.
    """
    was_training = model.training
    model.eval()
    collate = TaskCollator(pad_token_id, list(choices) if tasks is None else tasks)
    device = next(model.parameters()).device
    right: dict[str, list[bool]] = {task: [] for task in choices}
    prompts = sorted((_prompt(row) for row in rows), key=lambda row: len(row["input_ids"]))
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        batch = {k: v.to(device) for k, v in collate(chunk).items()}
        task_ids = batch.pop("task_ids")
        with route(task_ids) if tasks is not None else contextlib.nullcontext():
            logits = model(**batch, logits_to_keep=torch.tensor([-1], device=device)).logits[:, -1]
        for row, row_logits in zip(chunk, logits, strict=True):
            words = choices[row["task"]]
            right[row["task"]].append(words[int(row_logits[list(words)].argmax())] == row["answer"])
        on_batch(len(chunk))
    model.train(was_training)
    return {task: sum(hits) / len(hits) for task, hits in right.items() if hits}


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row up to its answer, and the answer's first token."""
    end = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    return {"input_ids": row["input_ids"][:end], "task": row["task"], "answer": row["labels"][end]}
