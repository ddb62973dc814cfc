"""How well a model answers, task by task, on mixed batches.

In:   a model, encoded rows (`input_ids`, `labels`, `task`), and the words each task may answer with, if it has words.
Out:  accuracy per task, or, where answers are texts, the loss per token of the right answer.
Who:  the demo, `alora train` and `alora eval`, before and after training.

For words the row is cut before its answer and the whole words compete by their likelihood: the choice a user of a
classifier sees, and the same question for the untuned base, which rarely says exactly the right word of its own accord.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import route
from .choices import Question, as_list, first_label, whole_words
from .collator import TaskCollator
from .loss import kept_positions, next_labels, predictable, row_losses


@torch.no_grad()
def choice_accuracy(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    choices: Mapping[str, Sequence[Sequence[int] | int]],
    *,
    tasks: Sequence[str] | None,
    eos_token_id: int | None = None,
    per_token: bool = False,
    pad_token_id: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> dict[str, float]:
    """Share of rows whose answer is the most likely of its task's words.

    Formula:
        score(word) = sum over its tokens of log p(token | prompt, tokens before it). Where a word is the beginning of
        another of its task, the end of the text counts as the last token of each.

    Args:
        model: a causal language model that knows `logits_to_keep`.
        rows: encoded test rows; the answer begins at the first label that follows a token. Rows of tasks that `choices`
            does not have are left out, and with a warning rows that have no such label.
        choices: token ids of the words that each task may answer with; a number is a word of one token. A row's answer
            is the longest word it begins with; a row that answers with none of them counts as wrong.
        tasks: names in the order of the model's ids for task routing; None for a model that takes no ids.
        eos_token_id: ends the answer of every row; not part of the words. None if rows do not end in one.
        per_token: compare the means over a word's tokens instead of the sums.
        pad_token_id: fills shorter rows.
        batch_size: rows per forward; rows of similar length share one.
        on_batch: called with the number of rows done, for a progress bar.

    Returns:
        Accuracy by task name, in the order of `choices`; NaN for a task of whose rows none is left.

    Raises:
        ValueError: a word is the beginning of another, and no token ends it.
    """
    words = {task: whole_words(given, eos_token_id) for task, given in choices.items()}
    asked = [row for row in rows if row["task"] in words]
    right: dict[str, list[bool]] = {task: [] for task in choices if any(row["task"] == task for row in asked)}
    open_ = [Question(row, words[row["task"]], eos_token_id, per_token) for row in _judged(asked)]
    names = list(choices) if tasks is None else tasks
    with _judging(model):
        while open_:
            open_.sort(key=lambda question: len(question.prompt) + len(question.context))
            inputs = [{"input_ids": [*q.prompt, *q.context], "task": q.task} for q in open_]
            undecided: list[Question] = []
            for start, (chunk, batch) in enumerate(_batches(model, inputs, names, pad_token_id, batch_size)):
                part = open_[start * batch_size :][: len(chunk)]
                for question, log_p in zip(part, _log_probabilities(model, batch, tasks, part), strict=True):
                    best = question.learn(log_p)
                    if best is None:
                        undecided.append(question)
                    else:
                        right[question.task].append(best == question.right)
                        on_batch(1)
            open_ = undecided
    return {task: _mean(hits) for task, hits in right.items()}


def _log_probabilities(
    model: nn.Module, batch: dict[str, Any], tasks: Sequence[str] | None, questions: Sequence[Question]
) -> list[Tensor]:
    """For each row `[1 + len(context), V]`: what follows its prompt, and each token of its context."""
    ends = batch["attention_mask"].cumsum(1).argmax(1)
    deepest = max(len(question.context) for question in questions)
    places = (ends[:, None] - torch.arange(deepest, -1, -1, device=ends.device)).clamp_min(0)
    keep, at = places.unique(return_inverse=True)
    with _routing(batch, tasks):
        logits = model(**batch, logits_to_keep=keep).logits
    log_p = logits[torch.arange(len(at), device=at.device)[:, None], at].float().log_softmax(-1).cpu()
    return [row[deepest - len(question.context) :] for row, question in zip(log_p, questions, strict=True)]


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
        rows: encoded test rows; those without a label that follows a token are left out with a warning.
        tasks, pad_token_id, batch_size, on_batch: as `choice_accuracy`.

    Returns:
        Loss by task name, in the order in which tasks appear; NaN for a task of whose rows none is left.
    """
    found: dict[str, list[float]] = {row["task"]: [] for row in rows}
    with _judging(model):
        for chunk, batch in _batches(
            model, _judged(rows), list(found) if tasks is None else tasks, pad_token_id, batch_size
        ):
            labels = predictable(batch.pop("labels"), batch["attention_mask"])
            keep = kept_positions(labels)
            with _routing(batch, tasks):
                logits = model(**batch, logits_to_keep=keep).logits
            losses, counts, _ = row_losses(logits, next_labels(labels[:, keep]))
            for row, value in zip(chunk, (losses / counts).tolist(), strict=True):
                found[row["task"]].append(value)
            on_batch(len(chunk))
    return {task: _mean(values) for task, values in found.items()}


def _judged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that ask for something; says how many do not."""
    kept = [row for row in rows if first_label(as_list(row["labels"])) is not None]
    if len(kept) < len(rows):
        warnings.warn(
            f"{len(rows) - len(kept)} of {len(rows)} rows are left out: no label in them follows a token", stacklevel=3
        )
    return kept


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


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
