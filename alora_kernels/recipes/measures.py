"""What a task is judged by: its own `metric`, or what its answers are made for. The table of measures is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from .. import data
from ..data import Task, TaskSpec
from ..text import percent
from ..training.answers import exact_match, last_number, number_match, rouge, words_of


class Measure(NamedTuple):
    """How people call it, in short and over a table, and how a value of it is shown."""

    name: str
    title: str
    show: Callable[[float], str]


def _perplexity(loss: float) -> str:
    return f"{loss:.3f} ({math.exp(min(loss, 99)):.1f})"


#: by the name of `TaskSpec.metric`
MEASURES = {
    "choice": Measure("accuracy", "accuracy: choice among the task's label words", percent),
    "exact": Measure("exact match", "written answers: exact match", percent),
    "rouge": Measure("ROUGE-L", "written answers: ROUGE-L", percent),
    "number": Measure("right numbers", "written answers: last number", percent),
    "loss": Measure("loss", "answers in text: loss per token (perplexity)", _perplexity),
}
#: what judges an answer that the model writes, beside the right one
WRITTEN: dict[str, Callable[[str, str], dict[str, float]]] = {
    "exact": lambda answer, right: {"exact": exact_match(answer, right)},
    "rouge": rouge,
    "number": lambda answer, right: {"number": number_match(answer, right)},
}


def metrics_of(
    sources: Sequence[str | Task | TaskSpec], text: Mapping[str, Any], labelled: Collection[str]
) -> dict[str, str]:
    """Task -> what it is judged by, of the tasks with test rows; `labelled` are those that answer with label words.

    A ValueError for a metric that a task cannot have, and where files that name the same task have different ones.
    """
    known = {source.name: source for source in map(data.as_source, sources)}
    present = {*text["train"]["task"], *text["test"]["task"]}  # who is not among them has a column of other names
    naming = [spec for spec in known.values() if isinstance(spec, TaskSpec) and spec.name not in present]
    answers: dict[str, list[str]] = {}
    for task, answer in zip(text["test"]["task"], text["test"]["answer"], strict=True):
        answers.setdefault(task, []).append(answer)
    chosen: dict[str, str] = {}
    for task, own in answers.items():
        source = known.get(task)
        metrics: list[Any] = [*{getattr(source, "metric", None)}] if source else [*{spec.metric for spec in naming}]
        if len(metrics) > 1:
            names = ", ".join(spec.name for spec in naming)
            raise ValueError(
                f"task {task!r} stands in a column of one of {names}, whose metrics differ: give these the same"
            )
        chosen[task] = metrics[0] or ("choice" if task in labelled else "loss")
        _check(task, chosen[task], own, task in labelled)
    return chosen


def _check(task: str, metric: str, answers: Sequence[str], labelled: bool) -> None:
    """Refuse a metric that cannot say anything about these answers."""
    if metric == "choice" and not labelled:
        raise ValueError(
            f"task {task!r} cannot have metric: choice, since hardly two of its answers are alike:"
            " choose exact, rouge, number or loss"
        )
    lacks: dict[str, Callable[[str], bool]] = {
        "number": lambda answer: last_number(answer) is None,
        "rouge": lambda answer: not words_of(answer),
    }
    bad = [answer for answer in answers if lacks.get(metric, lambda _: False)(answer)]
    if bad:
        what = "number" if metric == "number" else "word"
        raise ValueError(
            f"task {task!r} cannot have metric: {metric}, since {len(bad)} of its {len(answers)} test answers hold no"
            f" {what}, such as {bad[0][:40]!r}: choose exact or loss, or drop these rows"
        )
