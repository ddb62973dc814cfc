"""How well a model answers, task by task, on mixed batches.

In:   a model, encoded rows (`input_ids`, `labels`, `task`), and the words each task may answer with, if it has words.
Out:  accuracy per task, or, where answers are texts, the loss per token of the right answer.
Who:  the demo, `alora train` and `alora eval`, before and after training.

For words the row is cut before its answer and the words' first tokens compete: the choice a user of a classifier
sees, and the same question for the untuned base (which rarely says exactly the right word of its own accord).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..routing import route
from .collator import TaskCollator
from .loss import kept_positions, next_labels, predictable, row_losses
from .rules import IGNORED


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
        rows: encoded test rows; the first label that counts is the answer's first token. Rows of tasks that `choices`
            does not have are left out.
        choices: first tokens of the words that each task may answer with.
        tasks: names in the order of the model's ids for task routing; None for a model that takes no ids.
        pad_token_id: fills shorter rows.
        batch_size: rows per forward; rows of similar length share one.
        on_batch: called with the number of rows done, for a progress bar.

    Returns:
        Accuracy by task name, in the order of `choices`.
    """
    prompts = [_prompt(row) for row in rows if row["task"] in choices]
    right: dict[str, list[bool]] = {task: [] for task in choices}
    with _judging(model):
        for chunk, batch in _batches(
            model, prompts, list(choices) if tasks is None else tasks, pad_token_id, batch_size
        ):
            ends, at = batch["attention_mask"].cumsum(1).argmax(1).unique(return_inverse=True)
            with _routing(batch, tasks):
                logits = model(**batch, logits_to_keep=ends).logits[torch.arange(len(chunk)), at]
            for row, row_logits in zip(chunk, logits, strict=True):
                words = choices[row["task"]]
                right[row["task"]].append(words[int(row_logits[list(words)].argmax())] == row["answer"])
            on_batch(len(chunk))
    return {task: sum(hits) / len(hits) for task, hits in right.items() if hits}


@torch.no_grad()
def answer_loss(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    tasks: Sequence[str] | None,
    pad_token_id: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> dict[str, float]:
    """Mean negative log-likelihood of a token of the right answer; rows count alike, as in `ALoRATrainer.evaluate`.

    Formula:
        L = mean over rows of (-1 / |answer| sum over its tokens of log p(token | prompt, tokens before it)), in nats.

    Args:
        model: a causal language model that knows `logits_to_keep`.
        rows: encoded test rows.
        tasks, pad_token_id, batch_size, on_batch: as `choice_accuracy`.

    Returns:
        Loss by task name, in the order in which tasks appear.
    """
    found: dict[str, list[float]] = {row["task"]: [] for row in rows}
    with _judging(model):
        for chunk, batch in _batches(model, rows, list(found) if tasks is None else tasks, pad_token_id, batch_size):
            labels = predictable(batch.pop("labels"), batch["attention_mask"])
            keep = kept_positions(labels)
            with _routing(batch, tasks):
                logits = model(**batch, logits_to_keep=keep).logits
            losses, counts, _ = row_losses(logits, next_labels(labels[:, keep]))
            for row, value in zip(chunk, (losses / counts).tolist(), strict=True):
                found[row["task"]].append(value)
            on_batch(len(chunk))
    return {task: sum(values) / len(values) for task, values in found.items()}


@contextlib.contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], pad_token_id: int, batch_size: int
) -> Iterator[tuple[Sequence[Mapping[str, Any]], dict[str, Any]]]:
    """Rows of similar length and their batch on the model's device."""
    collate = TaskCollator(pad_token_id, tasks, model=model)
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        yield chunk, {k: v.to(device) for k, v in collate(chunk).items()}


def _routing(batch: dict[str, Any], tasks: Sequence[str] | None) -> contextlib.AbstractContextManager[Any]:
    """Route by the batch's ids, which leave it, where the model takes ids."""
    ids = batch.pop("task_ids")
    return contextlib.nullcontext() if tasks is None else route(ids)


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row up to its answer, and the answer's first token."""
    end = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    return {"input_ids": row["input_ids"][:end], "task": row["task"], "answer": row["labels"][end]}
