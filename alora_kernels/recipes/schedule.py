"""When a run logs, evaluates and saves, from its recipe and its rows, before the model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..text import did_you_mean
from ..training import TaskBalancedSampler
from .recipe import Recipe

LOGGED = 10  # steps between logs of a long run
TIMES = 10  # evaluations, or checkpoints without them, in a run


@dataclass(frozen=True)
class Schedule:
    """Steps of a run; 0 stands for never."""

    total: int
    logging: int
    eval: int
    save: int
    keep_best: bool


def schedule(recipe: Recipe, tasks: Sequence[str], validates: bool) -> Schedule:
    """The schedule of a run on training rows with these tasks, with or without validation rows.

    A ValueError says every setting that does not fit the data: names of unknown tasks, evaluations without rows.
    """
    wrong = list(_strangers(recipe, tasks))
    if not validates and (asked := [k for k in ("eval_steps", "early_stopping") if getattr(recipe, k)]):
        wrong.append(f"{' and '.join(asked)}: no rows to judge while training: give validation_size")
    if wrong:
        raise ValueError("\n".join(wrong))
    total = recipe.steps or math.ceil((recipe.epochs or 0) * steps_of_epoch(recipe, tasks))
    every = (recipe.eval_steps or recipe.save_steps or max(1, total // TIMES)) if validates else 0
    if every > total:
        raise ValueError(f"eval_steps: a run of {total} steps ends before step {every}: give at most {total}")
    best = validates and recipe.keep_best
    if best and recipe.save_steps == 0:
        raise ValueError("save_steps: the best model is one of the checkpoints: leave it out, or say keep_best: false")
    default = every or max(1, total // TIMES)
    save = every if best else default if recipe.save_steps is None else recipe.save_steps
    return Schedule(total, recipe.logging_steps or min(LOGGED, max(1, total // 12)), every, save, best)


def steps_of_epoch(recipe: Recipe, tasks: Sequence[str]) -> int:
    """Optimiser steps in which every row is drawn once, as temperature and weights have it."""
    rows = len(TaskBalancedSampler(tasks, temperature=recipe.temperature, weights=recipe.weights))
    return math.ceil(math.ceil(rows * recipe.gradient_accumulation / recipe.batch_size) / recipe.gradient_accumulation)


def _strangers(recipe: Recipe, tasks: Sequence[str]) -> list[str]:
    known = sorted(set(tasks))
    return [
        f"weights: no training rows of task {name!r}; {did_you_mean(name, known)}"
        for name in recipe.weights
        if name not in known
    ]
