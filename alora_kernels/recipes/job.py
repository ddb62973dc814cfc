"""From a recipe to a `Run`: the base with its adapter, the rows as text and as token ids, the words of answers.

`alora train`, `alora eval` and the demo begin here. Each step prints its own progress.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from transformers import BitsAndBytesConfig, set_seed

from .. import data, precision
from ..adapters.method import METHODS, ROUTED, Method, read_method
from ..baselines.methods import adapt, as_large_as_alora, load_method, parameters_of, target_shapes, tasks_of
from ..data import Task, TaskSpec
from ..text import did_you_mean, listed
from ..training import TaskBalancedSampler
from ..training.answers import last_number, words_of
from ..training.evaluate import whole_words
from ..tuner.config import CONFIG
from . import display
from .recipe import Recipe
from .start import Start, start_of

ADAPTER = "adapter"  # in the output folder
UNLIMITED = 10**9  # what tokenizers that know no limit say, or more
MANY_ANSWERS = 16  # a task with more different answers, most of them seen once, answers in texts
LOGGED = 10  # steps between logs of a long run
TIMES = 10  # evaluations, or checkpoints without them, in a run


@dataclass
class Run:
    """Everything a recipe becomes: first its rows, then a model."""

    recipe: Recipe
    tasks: tuple[str, ...]  # names in the order of their ids
    tokenizer: Any
    text: DatasetDict  # rows as text; `train`, `test` and `validation` are the same rows as token ids
    train: Dataset
    test: Dataset
    validation: Dataset | None  # rows that judge while training
    choices: dict[str, dict[str, tuple[int, ...]]]  # task -> its words -> their ids; no tasks that answer in texts
    metrics: dict[str, str]  # task -> what it is judged by, one of `judge.MEASURES`
    start: Start | None  # None of a fresh adapter, and of one that is judged
    notes: list[str]  # what rows have lost
    lost: data.Lost = field(default_factory=data.Lost)  # what they lose while they are read in training
    learnt: Any = None  # what is trained on: `train`, of it the rows of tasks that learn, or a stream it is the head of
    model: Any = None  # the base with the adapter (a `PeftModel` for ALoRA and LoRA)
    method: Any = None  # a `Method`, the rank as the recipe's budget chose it
    alora_parameters: int = 0  # how many ALoRA of the recipe's rank trains, the measure of `budget: parameters`

    @property
    def label(self) -> str:
        """How tables call the method."""
        return METHODS[self.method.name]


def load(recipe: Recipe, adapter: Path | None = None, resume: str | None = None, whose: str = "asked for") -> Run:
    """Base, data and adapter: a fresh adapter, or the one in a folder; tasks in the order of a run that goes on.

    The run's recipe has the dtype that `auto` became, so that the copy beside the adapter says it; `whose` wish another
    dtype was, see `precision.explain`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # `auto` is measured, so that processes might choose differently: the first chooses for all
    chosen = broadcast_object_list([precision.explain(device, recipe.dtype, whose)])[0]
    if recipe.load_in:
        check_packages({"load_in": "bitsandbytes"})
    # all that can be wrong with data is said before weights are read, which takes minutes for a large model
    run = _rows(recipe.located(Path()).instead(dtype=chosen.name), adapter, resume)
    recipe, start = run.recipe, run.start
    bits = f"{recipe.load_in} weights, computing in " if recipe.load_in else ""
    display.say(f"base in {bits}{chosen.name} ({chosen.reason})", "dim")
    base, _ = data.load_model(recipe.model, dtype=chosen.dtype, quantization=quantized(recipe, chosen.dtype))
    with display.err.status("preparing adapter ..."):
        method, shapes = sized(recipe, run.tasks, base)
        run.model, run.method, run.tasks = _adapted(base, method, recipe.seed, start, adapter)
        if recipe.parallel == "ddp" or adapter is not None:  # FSDP takes a part of each layer there
            run.model.to(device)
    for line in (*(start.lines(run.train["task"], base) if start else ()), *run.notes):
        display.say(line, "dim")
    tasks, experts = len(run.tasks), recipe.num_experts
    run.alora_parameters = parameters_of("alora", recipe.r, shapes, tasks=tasks, num_experts=experts)
    return run


def _rows(recipe: Recipe, adapter: Path | None, resume: str | None) -> Run:
    """A run without its model; a ValueError for all that is wrong with its data."""
    lost, start = data.Lost(), None
    text = read(recipe, lost)
    if adapter is not None:
        text, recipe = _known_to(adapter, text), recipe.instead(weights={})  # of tasks that may be gone
    tasks = _task_order(recipe, text, resume)
    if adapter is None:
        recipe, start = start_of(recipe, tasks)
    words = label_words(text, recipe.tasks)
    metrics = metrics_of(recipe.tasks, text, words)
    words = {task: own for task, own in words.items() if metrics.get(task, "choice") == "choice"}
    with display.err.status("preparing tokens ..."):
        tokenizer = data.load_tokenizer(recipe.model)
        recipe = recipe.instead(max_length=max_length(recipe, tokenizer))
        how: dict[str, Any] = recipe.model_dump(include={"max_length", "chat_template"})
        text, ids = data.encode_splits(text, tokenizer, lost=lost, **how)
        cues = dict(zip(text["train"]["task"], text["train"]["prompt"], strict=True))  # one prompt of each task
        choices = {task: data.word_tokens(labels, tokenizer, cues[task]) for task, labels in words.items()}
    notes = _unseen(text, choices, tokenizer)
    train, test, validation = ids["train"], ids["test"], ids.get("validation")
    if adapter is None:  # says what does not fit the rows
        schedule(recipe, start.trained(train["task"]) if start else train["task"], validates=validation is not None)
    notes = lost.lines() + notes
    run = Run(recipe, tasks, tokenizer, text, train, test, validation, choices, metrics, start, notes, learnt=train)
    if recipe.streaming:
        how |= recipe.model_dump(include={"seed", "train_size", "weights"})
        run.learnt = data.stream(recipe.tasks, text, tokenizer, lost=run.lost, **how)
    run.learnt = start.rows(run.learnt) if start else run.learnt
    return run


def _adapted(
    base: Any, method: Method, seed: int, start: Start | None, adapter: Path | None
) -> tuple[Any, Method, tuple[str, ...]]:
    """The base with a fresh adapter, one that training goes on from, or one to judge; its method and tasks."""
    set_seed(seed)
    if start is not None:
        saved = read_method(start.file.folder) or method
        return start.model(base, seed), replace(saved, tasks=start.tasks), start.tasks
    if adapter is None:
        return adapt(base, method), method, method.tasks
    model = load_method(base, adapter)
    return model, read_method(adapter) or method, tasks_of(model) or method.tasks


def check_packages(needed: Mapping[str, str]) -> None:
    """Raise an ImportError with the line that installs what is not there; key of the recipe -> package."""
    missing = {key: package for key, package in needed.items() if importlib.util.find_spec(package) is None}
    if missing:
        keys = ", ".join(f"{key} needs {package}" for key, package in missing.items())
        raise ImportError(f"{keys}: pip install {' '.join(dict.fromkeys(missing.values()))}")


def quantized(recipe: Recipe, dtype: torch.dtype) -> Any:
    """How the base is loaded in a few bits; None in as many as `dtype` has.

    PEFT's preparation for such training is left out: it makes norms and head float32, and a frozen base needs neither.
    """
    if recipe.load_in is None:
        return None
    if recipe.load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    how: Any = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **how)


def read(recipe: Recipe, lost: data.Lost) -> DatasetDict:
    """The rows of a recipe's tasks as text."""
    sizes = recipe.model_dump(include={"seed", "train_size", "test_size", "validation_size", "streaming"})
    with display.err.status("reading data ..."):
        return data.load_tasks(recipe.tasks, lost=lost, **sizes)


def _known_to(adapter: Path, text: DatasetDict) -> DatasetDict:
    """The rows that an adapter can be judged by, and what its tasks, which come and go, leave unjudged."""
    method = read_method(adapter)
    tasks = method.tasks if method is not None and method.name in ROUTED else ()
    present = list(dict.fromkeys(text["test"]["task"]))
    gone, silent = [t for t in present if t not in tasks], [t for t in tasks if t not in present]
    if not tasks or not gone + silent:
        return text
    if len(gone) == len(present):
        raise ValueError(
            f"{adapter} has the tasks {listed(tasks, 8)}, and the rows are of {listed(gone, 8)}: give a recipe with"
            " rows of its tasks (--data)"
        )
    if gone:
        display.say(f"not judged, for the adapter has no such task: {listed(gone, 8)}", "yellow")
    if silent:
        display.say(f"not judged, for there are no rows: {listed(silent, 8)}", "yellow")
    return text.filter(lambda row: row["task"] in tasks)


def sized(recipe: Recipe, tasks: tuple[str, ...], base: Any) -> tuple[Method, list[tuple[int, int]]]:
    """The method on a base, with the rank that the recipe's budget gives it, and the shapes of the layers it adapts."""
    method = recipe.adapters(tasks)
    shapes = target_shapes(base, method)
    return as_large_as_alora(method, shapes) if recipe.budget == "parameters" else method, shapes


def max_length(recipe: Recipe, tokenizer: Any) -> int:
    """Tokens that a row may have: the recipe's number, or the model's `context`."""
    return recipe.max_length or context(data.load_config(recipe.model), tokenizer)


def context(config: Any, tokenizer: Any) -> int:
    """Tokens that a model can read at once; a ValueError where neither it nor its tokenizer says."""
    known = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    sizes = [int(size) for size in known if size and size < UNLIMITED]
    if not sizes:
        raise ValueError("max_length: this model does not say how many tokens it can read: give a number")
    return min(sizes)


def _task_order(recipe: Recipe, text: DatasetDict, resume: str | None) -> tuple[str, ...]:
    """Names of the tasks in the data: a checkpoint's if they are the same, else the recipe's and what files add."""
    named = [data.as_source(task).name for task in recipe.tasks]
    present = set(text["train"]["task"])
    config = Path(resume, CONFIG) if resume else None
    saved = json.loads(config.read_text(encoding="utf-8")).get("tasks") if config and config.is_file() else None
    if saved and set(saved) == present:
        return tuple(saved)
    return (*(name for name in named if name in present), *sorted(present - set(named)))


def label_words(text: DatasetDict, sources: Sequence[Any] = ()) -> dict[str, list[str]]:
    """Each task's answer words: a built-in task's label words, else the answers seen in training.

    Chats answer in texts, however few, unless their source says `metric: choice`.
    """
    own = {source.name for source in map(data.as_source, sources) if getattr(source, "metric", None) == "choice"}
    chats = {task for task, turns in data.by_task(text["train"], "messages").items() if any(turns)} - own
    answers = {task: Counter(given) for task, given in data.by_task(text["train"], "answer").items()}
    return {
        name: list(data.labels_of(name) if name in data.TASKS else seen)
        for name, seen in sorted(answers.items())
        if name in data.TASKS or not (name in chats or _are_texts(seen))
    }


def _are_texts(answers: Counter[str]) -> bool:
    """Whether these answers are texts, hardly any two alike, and not words to choose from."""
    once = sum(count == 1 for count in answers.values())
    return len(answers) > MANY_ANSWERS and 2 * once > len(answers)


def metrics_of(
    sources: Sequence[str | Task | TaskSpec], text: DatasetDict, labelled: Collection[str]
) -> dict[str, str]:
    """Task -> what it is judged by, of the tasks with test rows; `labelled` are those that answer with label words.

    A ValueError for a metric that a task cannot have, and where files that name the same task have different ones.
    """
    known = {source.name: source for source in map(data.as_source, sources)}
    present = {*text["train"]["task"], *text["test"]["task"]}  # who is not among them has a column of other names
    naming = [spec for spec in known.values() if isinstance(spec, TaskSpec) and spec.name not in present]
    chosen: dict[str, str] = {}
    for task, answers in data.by_task(text["test"], "answer").items():
        source = known.get(task)
        metrics: list[Any] = [*{getattr(source, "metric", None)}] if source else [*{spec.metric for spec in naming}]
        if len(metrics) > 1:
            names = ", ".join(spec.name for spec in naming)
            raise ValueError(
                f"task {task!r} stands in a column of one of {names}, whose metrics differ: give these the same"
            )
        chosen[task] = metrics[0] or ("choice" if task in labelled else "loss")
        _check_metric(task, chosen[task], answers, task in labelled)
    return chosen


def _check_metric(task: str, metric: str, answers: Sequence[str], labelled: bool) -> None:
    """Refuse a metric that cannot say anything about these answers."""
    if metric == "choice" and not labelled:
        raise ValueError(
            f"task {task!r} cannot have metric: choice, since hardly two of its answers are alike:"
            " choose exact, rouge, number or loss"
        )
    needs: dict[str, tuple[str, Callable[[str], Any]]] = {
        "number": ("number", lambda answer: last_number(answer) is not None),
        "rouge": ("word", words_of),
    }
    what, holds = needs.get(metric, ("", lambda _: True))
    if bad := [answer for answer in answers if not holds(answer)]:
        raise ValueError(
            f"task {task!r} cannot have metric: {metric}, since {len(bad)} of its {len(answers)} test answers hold no"
            f" {what}, such as {bad[0][:40]!r}: choose exact or loss, or drop these rows"
        )


def _unseen(text: DatasetDict, choices: Mapping[str, Mapping[str, tuple[int, ...]]], tokenizer: Any) -> list[str]:
    """A line about test answers that are no words of their task; a ValueError for words that cannot be told apart."""
    for task, words in choices.items():
        try:
            whole_words(list(words.values()), tokenizer.eos_token_id)
        except ValueError:
            raise ValueError(
                f"task {task!r}: some of its label words begin others, and this tokenizer has no end of text to tell"
                f" them apart by; choose other words, e.g. with `words:` in the recipe"
            ) from None
    answers = zip(text["test"]["task"], text["test"]["answer"], strict=True)
    counts = Counter(task for task, answer in answers if task in choices and answer not in choices[task])
    said = ", ".join(f"{task} {count}" for task, count in counts.items())
    return [f"test rows whose answer no training row has, counted as wrong: {said}"] if counts else []


@dataclass(frozen=True)
class Schedule:
    """When a run logs, evaluates and saves, in steps; 0 stands for never."""

    total: int
    logging: int
    eval: int
    save: int
    keep_best: bool


def schedule(recipe: Recipe, tasks: Sequence[str], validates: bool) -> Schedule:
    """The schedule of a run on training rows with these tasks, with or without validation rows.

    A ValueError says every setting that does not fit the data: names of unknown tasks, evaluations without rows.
    """
    known = sorted(set(tasks))
    strangers = [name for name in recipe.weights if name not in known]
    wrong = [f"weights: no training rows of task {name!r}; {did_you_mean(name, known)}" for name in strangers]
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
