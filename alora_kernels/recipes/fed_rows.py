"""A client's task as token ids and targets, read and tokenised once per process.

In:   a task's name or a file, a tokenizer, sizes and a seed.
Out:  `Rows`; padded batches of them.
Who:  `participants`.

A causal model is asked with the prompt alone, cut where its answer begins; the target is the answer's first token. For
an encoder the target is the number of the answer's label word, so a client's words and their order belong to its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import data


@dataclass(frozen=True, eq=False)
class Rows:
    """One client's data.

    Attributes:
        labels: the words it answers with.
        choices: what a prediction is chosen among, per label: token ids, or 0, 1, ... for a classifier.
        train, test: token ids of each row.
        train_target, test_target: per row, the right one of `choices`.
        majority: test accuracy of always giving the most frequent training answer.
        causal: whether targets are tokens; such rows are padded on the left, so that all answers begin together.
    """

    labels: tuple[str, ...]
    choices: Tensor
    train: Sequence[Sequence[int]]
    test: Sequence[Sequence[int]]
    train_target: Tensor
    test_target: Tensor
    majority: float
    causal: bool


@lru_cache(maxsize=32)
def task_rows(
    task: str | None,
    data_file: str | None,
    *,
    causal: bool,
    tokenizer: Any,
    seed: int,
    train_size: int | None,
    test_size: int,
    max_length: int,
) -> Rows:
    """Rows of one task.

    Args:
        task: built-in task, `.jsonl` file or hub id; None if there is a file.
        data_file: a `.jsonl` file that takes its place; answers must be the task's label words if it is built in.
        causal: whether the model answers in words.
        tokenizer: the model's.
        seed: decides which rows are test rows.
        train_size, test_size: at most so many rows; None takes all that are left.
        max_length: tokens per row; longer ones are cut.

    Raises:
        ValueError: fewer than two different answers, answers that are not label words, or as in `data.load_task`.
    """
    name = data_file if data_file is not None else task
    if name is None:
        raise ValueError("task_rows needs a task or a data_file")
    source = data.TaskSpec("own", name, task_column=None) if data_file is not None else name
    splits = data.load_task(source, seed=seed, train_size=train_size, test_size=test_size)
    answers = {split: list(splits[split]["answer"]) for split in ("train", "test")}
    labels = _labels(task, name, set(answers["train"]) | set(answers["test"]))
    number = data.first_tokens(labels, tokenizer) if causal else {label: i for i, label in enumerate(labels)}
    ids = {split: _prompts(splits[split], tokenizer, causal, max_length) for split in ("train", "test")}
    most = max(labels, key=answers["train"].count)
    return Rows(
        labels=labels,
        choices=torch.tensor([number[label] for label in labels]),
        train=ids["train"],
        test=ids["test"],
        train_target=torch.tensor([number[answer] for answer in answers["train"]]),
        test_target=torch.tensor([number[answer] for answer in answers["test"]]),
        majority=answers["test"].count(most) / len(answers["test"]),
        causal=causal,
    )


def _labels(task: str | None, name: str, answers: set[str]) -> tuple[str, ...]:
    """Label words of a built-in task, else the answers that occur, sorted."""
    if task not in data.TASKS:
        if len(answers) < 2:
            raise ValueError(f"{name!r} has one answer only, {', '.join(answers)!r}; there is nothing to learn from it")
        return tuple(sorted(answers))
    known = data.labels_of(task)
    other = sorted(answers - set(known))
    if other:
        raise ValueError(
            f"{name!r} answers {', '.join(map(repr, other[:3]))}, task {task!r} has {', '.join(known)}; rename the "
            f"answers, or give the client no task in the configuration"
        )
    return known


def _prompts(split: Any, tokenizer: Any, causal: bool, max_length: int) -> list[list[int]]:
    """Token ids of each prompt."""
    if not causal:
        return tokenizer(list(split["prompt"]), truncation=True, max_length=max_length).input_ids
    encoded = data.encode(split, tokenizer, max_length)
    ends = [next(i for i, label in enumerate(labels) if label >= 0) for labels in encoded["labels"]]
    return [ids[:end] for ids, end in zip(encoded["input_ids"], ends, strict=True)]


def collate(rows: Sequence[Sequence[int]], pad: int, *, left: bool, device: torch.device) -> Mapping[str, Tensor]:
    """Rows padded to the longest of them.

    Args:
        rows: token ids.
        pad: fills shorter rows.
        left: pad on the left and number the positions from each row's first token.
        device: where the model is.

    Returns:
        `input_ids`, `attention_mask` `[rows, length]`, and `position_ids` where padded on the left.
    """
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if left:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return {key: value.to(device) for key, value in batch.items()}
