"""How well a model answers, task by task, on mixed batches: accuracy of words, loss of texts.

For words the row is cut before its answer and the whole words compete by their likelihood: the choice a user of a
classifier sees, and the same question for the untuned base. A log-probability is at most 0, so what is known of a word
bounds the whole of it from above. The word with the highest bound is looked at until it is known whole; then no other
can be likelier. Words of one token need the prompt alone, and so does every word that its first token rules out.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import route
from .collator import TaskCollator
from .loss import kept_positions, label_counts, next_labels, predictable, row_losses
from .output_head import without_dropout
from .rules import IGNORED

Row = Mapping[str, Any]
Word = tuple[int, ...]


@torch.no_grad()
def choice_accuracy(
    model: nn.Module,
    rows: Sequence[Row],
    choices: Mapping[str, Sequence[Sequence[int] | int]],
    *,
    tasks: Sequence[str] | None,
    eos_token_id: int | None = None,
    per_token: bool = False,
    pad_token_id: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda rows: None,
    on_choice: Callable[[str, int | None, int], None] = lambda task, right, chosen: None,
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
        on_choice: called for each row with its task and the places among its words of the right one, if it is one of
            them, and of the chosen one.

    Returns:
        Accuracy by task name, in the order of `choices`; NaN for a task of whose rows none is left.

    Raises:
        ValueError: a word is the beginning of another, and no token ends it.
    """
    words = {task: whole_words(given, eos_token_id) for task, given in choices.items()}
    asked = [row for row in rows if row["task"] in words]
    right: dict[str, list[bool]] = {task: [] for task in choices if any(row["task"] == task for row in asked)}
    open_ = [Question(row, words[row["task"]], eos_token_id, per_token) for row in _judged(asked)]
    collate = TaskCollator(pad_token_id, list(choices) if tasks is None else tasks, model=model)
    with without_dropout(model):
        while open_:
            open_.sort(key=lambda question: len(question.prompt) + len(question.context))  # as `batches` does
            inputs = [{"input_ids": [*q.prompt, *q.context], "task": q.task} for q in open_]
            undecided, rest = [], iter(open_)
            for chunk, batch in batches(model, inputs, collate, batch_size):
                part = list(islice(rest, len(chunk)))
                for question, log_p in zip(part, _log_probabilities(model, batch, tasks, part), strict=True):
                    best = question.learn(log_p)
                    if best is None:
                        undecided.append(question)
                    else:
                        right[question.task].append(best == question.right)
                        on_choice(question.task, question.right, best)
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
    logits = _logits(model, batch, tasks, keep)
    log_p = logits[torch.arange(len(at), device=at.device)[:, None], at].float().log_softmax(-1).cpu()
    return [row[deepest - len(question.context) :] for row, question in zip(log_p, questions, strict=True)]


@torch.no_grad()
def answer_loss(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    tasks: Sequence[str] | None,
    pad_token_id: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> dict[str, float]:
    """Mean negative log-likelihood of a token of the right answer; rows count alike, as in `ALoRATrainer.evaluate`.

    Formula: `L = mean over rows of (-1 / |answer| sum over its tokens of log p(token | prompt, tokens before it))`,
    nats.

    Gives the loss by task name, in the order in which tasks appear; NaN for a task of whose rows none is left, because
    rows without a label that follows a token are left out, with a warning. Arguments as in `choice_accuracy`.
    """
    found: dict[str, list[float]] = {row["task"]: [] for row in rows}
    collate = TaskCollator(pad_token_id, list(found) if tasks is None else tasks, model=model)
    with without_dropout(model):
        for chunk, batch in batches(model, _judged(rows), collate, batch_size):
            labels = predictable(batch.pop("labels"), batch["attention_mask"])
            keep = kept_positions(labels)
            asked = next_labels(labels[:, keep])
            losses, _ = row_losses(_logits(model, batch, tasks, keep), asked)
            for row, value in zip(chunk, (losses / label_counts(asked)).tolist(), strict=True):
                found[row["task"]].append(value)
            on_batch(len(chunk))
    return {task: _mean(values) for task, values in found.items()}


def batches(
    model: nn.Module, rows: Sequence[Row], collate: Callable[[Sequence[Row]], Mapping[str, Tensor]], batch_size: int
) -> Iterator[tuple[Sequence[Row], dict[str, Tensor]]]:
    """Rows, those of similar length together, and their batch on the model's device."""
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        yield chunk, {name: value.to(device) for name, value in collate(chunk).items()}


def whole_words(words: Sequence[Sequence[int] | int], eos_token_id: int | None) -> list[Word]:
    """The words' tokens, each once; with the end of the text where one is the beginning of another."""
    found = list(dict.fromkeys(tuple(w) if isinstance(w, Sequence) else (int(w),) for w in words))
    if not found or not all(found):
        raise ValueError("a task has no words to choose from, or a word no tokens: leave them out")
    begun = next(((a, b) for a, b in pairwise(sorted(found)) if b[: len(a)] == a), None)
    if begun is None:
        return found
    if eos_token_id is None:
        raise ValueError(
            f"the word of tokens {list(begun[0])} is the beginning of {list(begun[1])}, and nothing ends it: give "
            f"eos_token_id, a tokenizer with an end of text, or other words"
        )
    return [(*word, eos_token_id) for word in found]


class Question:
    """One row and what is known of its task's words; arguments as `choice_accuracy`, words from `whole_words`."""

    def __init__(self, row: Row, words: Sequence[Word], eos_token_id: int | None, per_token: bool) -> None:
        labels = torch.as_tensor(row["labels"]).tolist()
        start = _first_label(labels) or 0
        self.task, self.prompt, self.words = row["task"], torch.as_tensor(row["input_ids"]).tolist()[:start], words
        self.context: Word = ()  # tokens of a word after the prompt, to be judged next
        self._lengths = [len(word) if per_token else 1 for word in words]
        self._known = [0] * len(words)  # tokens of each word
        self._bounds = [0.0] * len(words)
        answer = tuple(label for label in labels[start:] if label != IGNORED)
        ended = [w if eos_token_id is None or w[-1] == eos_token_id else (*w, eos_token_id) for w in words]
        fits = [i for i, w in enumerate(ended) if answer[: len(w)] == w or answer == words[i]]
        self.right = max(fits, key=lambda i: len(words[i]), default=None)  # number of the right word

    def learn(self, log_p: Tensor) -> int | None:
        """Take in log-probabilities `[1 + len(context), V]` of what follows the prompt and each token of the context.

        Gives the number of the most likely word if it is settled; else None, and `context` is another one.
        """
        for i, word in enumerate(self.words):
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(word, self.context)))
            known = min(same + 1, len(word))
            if known > self._known[i]:
                total = log_p[torch.arange(known), list(word[:known])].double().sum()
                self._known[i], self._bounds[i] = known, float(total) / self._lengths[i]
        best = max(range(len(self.words)), key=lambda i: (self._bounds[i], self._known[i] == len(self.words[i])))
        self.context = self.words[best][:-1]
        return best if self._known[best] == len(self.words[best]) else None


def last_turn(row: Row) -> Row:
    """A row of which the last run of labels alone is asked for: the last turn of a chat, the answer of others."""
    labels = torch.as_tensor(row["labels"]).tolist()
    end = max((at for at, label in enumerate(labels) if label != IGNORED), default=-1) + 1
    start = next((at for at in range(end, 0, -1) if labels[at - 1] == IGNORED), 0)
    return {**row, "labels": [IGNORED] * start + labels[start:]}


def _first_label(labels: Sequence[int]) -> int | None:
    """Position of the first label that follows a token; None without one."""
    return next((i for i, label in enumerate(labels) if i and label != IGNORED), None)


def _judged(rows: Sequence[Row]) -> list[Row]:
    kept = [row for row in rows if _first_label(torch.as_tensor(row["labels"]).tolist()) is not None]
    if len(kept) < len(rows):
        warnings.warn(
            f"{len(rows) - len(kept)} of {len(rows)} rows are left out: no label in them follows a token", stacklevel=3
        )
    return kept


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _logits(model: nn.Module, batch: dict[str, Any], tasks: Sequence[str] | None, keep: Tensor) -> Tensor:
    """Logits at some positions, routed by the batch's ids where the model takes ids."""
    ids = batch.pop("task_ids")
    with contextlib.nullcontext() if tasks is None else route(ids):
        return model(**batch, logits_to_keep=keep).logits
