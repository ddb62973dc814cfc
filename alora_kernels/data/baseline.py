"""The score that knows nothing: always answer what was most frequent in training.

In:   train and test splits with columns `answer` and `task` (from `loading`).
Out:  accuracy per task.
Who:  every report of accuracies; a trained model is worth its difference to this number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict


def majority_baseline(dataset: DatasetDict) -> dict[str, float]:
    """Accuracy, per task, of always giving the task's most frequent train answer on its test rows.

    Args:
        dataset: splits `train` and `test` with columns `answer` and `task`.

    Returns:
        Task -> accuracy in [0, 1], sorted by task. Of equally frequent answers the alphabetically first counts.

    Raises:
        ValueError: a task has test rows but no train rows.
    """
    train = _answers(dataset, "train")
    test = _answers(dataset, "test")
    untrained = [task for task in test if task not in train]
    if untrained:
        raise ValueError(f"no train rows for {', '.join(untrained)}; tasks with train rows: {', '.join(train)}")
    scores: dict[str, float] = {}
    for task in sorted(test):
        majority = min(train[task], key=lambda answer: (-train[task][answer], answer))
        scores[task] = test[task][majority] / test[task].total()
    return scores


def _answers(dataset: DatasetDict, split: str) -> dict[str, Counter[str]]:
    """How often each answer occurs, per task."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for task, answer in zip(dataset[split]["task"], dataset[split]["answer"], strict=True):
        counts[task][answer] += 1
    return dict(counts)
