"""From a recipe to a `Run`: the base with its adapter, the rows as text and as token ids, the words of answers.

`alora train`, `alora eval` and the demo begin here. Each step prints its own progress.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping, Sequence
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
from ..text import listed
from ..training.evaluate import whole_words
from ..tuner.config import CONFIG
from . import display
from .measures import metrics_of
from .recipe import Recipe
from .schedule import schedule
from .start import Start, start_of

ADAPTER = "adapter"  # in the output folder
UNLIMITED = 10**9  # what tokenizers that know no limit say, or more
MANY_ANSWERS = 16  # a task with more different answers, most of them seen once, answers in texts


@dataclass
class Run:
    """Everything a recipe becomes once loaded."""

    recipe: Recipe
    method: Method  # the rank as the recipe's budget chose it
    tasks: tuple[str, ...]  # names in the order of their ids
    model: Any  # the base with the adapter (a `PeftModel` for ALoRA and LoRA)
    tokenizer: Any
    text: DatasetDict  # rows as text; `train`, `test` and `validation` are the same rows as token ids
    train: Dataset
    test: Dataset
    choices: dict[
        str, dict[str, tuple[int, ...]]
    ]  # task -> its words -> their token ids; no tasks that answer in texts
    alora_parameters: int  # how many ALoRA of the recipe's rank trains, the measure of `budget: parameters`
    validation: Dataset | None = None  # rows that judge while training
    metrics: dict[str, str] = field(default_factory=dict)  # task -> what it is judged by, one of `measures.MEASURES`
    learnt: Any = (
        None  # what the trainer reads: `train`, of it the rows of tasks that learn, or a stream it is the head of
    )
    lost: data.Lost = field(default_factory=data.Lost)  # what they lose, while they are read

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
    recipe = recipe.located(Path()).instead(dtype=chosen.name)
    if recipe.load_in:
        check_packages({"load_in": "bitsandbytes"})
    lost = data.Lost()
    text = read(recipe, lost)
    start: Start | None = None
    if adapter is None:
        tasks = _task_order(recipe, text, resume)
        recipe, start = start_of(recipe, tasks)
    else:
        text, recipe = _known_to(adapter, text), recipe.instead(weights={})  # of tasks that may be gone
        tasks = _task_order(recipe, text, resume)
    words = label_words(text, recipe.tasks)
    metrics = metrics_of(recipe.tasks, text, words)
    words = {task: own for task, own in words.items() if metrics.get(task, "choice") == "choice"}
    # all that can be wrong with data is said before weights are read, which takes minutes for a large model
    with display.err.status("preparing tokens ..."):
        tokenizer = data.load_tokenizer(recipe.model)
        length = max_length(recipe, tokenizer)
        recipe = recipe.instead(max_length=length)
        text, ids = data.encode_splits(text, tokenizer, length, lost=lost, chat_template=recipe.chat_template)
        cues = dict(zip(text["train"]["task"], text["train"]["prompt"], strict=True))  # one prompt of each task
        choices = {task: data.word_tokens(labels, tokenizer, cues[task]) for task, labels in words.items()}
    unseen = _unseen(text, choices, tokenizer)
    rows = ids["train"]["task"]
    trained = start.trained(rows) if start else rows
    if adapter is None:
        schedule(recipe, trained, validates="validation" in ids)  # says what does not fit the rows
    bits = f"{recipe.load_in} weights, computing in " if recipe.load_in else ""
    display.say(f"base in {bits}{chosen.name} ({chosen.reason})", "dim")
    base, _ = data.load_model(recipe.model, dtype=chosen.dtype, quantization=quantized(recipe, chosen.dtype))
    with display.err.status("preparing adapter ..."):
        method, shapes = sized(recipe, tasks, base)
        model, method, tasks = _adapted(base, method, recipe.seed, start, adapter)
        if recipe.parallel == "ddp" or adapter is not None:  # FSDP takes a part of each layer there
            model.to(device)
    said = start.lines(len(rows) - len(trained), base) if start else []
    for line in (*said, *lost.lines(), *unseen):
        display.say(line, "dim")
    count = parameters_of("alora", recipe.r, shapes, tasks=len(tasks), num_experts=recipe.num_experts)
    train, test, validation = ids["train"], ids["test"], ids.get("validation")
    run = Run(recipe, method, tasks, model, tokenizer, text, train, test, choices, count, validation, metrics)
    learnt: Any = train
    if recipe.streaming:
        how = recipe.model_dump(include={"max_length", "seed", "train_size", "weights", "chat_template"})
        learnt = data.stream(recipe.tasks, text, tokenizer, lost=run.lost, **how)
    run.learnt = learnt if start is None else start.rows(learnt)
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
    asked = zip(text["train"]["task"], text["train"]["messages"], strict=True)
    chats = {task for task, messages in asked if messages} - own
    answers: dict[str, Counter[str]] = {}
    for task, answer in zip(text["train"]["task"], text["train"]["answer"], strict=True):
        answers.setdefault(task, Counter())[answer] += 1
    return {
        name: list(data.labels_of(name) if name in data.TASKS else seen)
        for name, seen in sorted(answers.items())
        if name in data.TASKS or not (name in chats or _are_texts(seen))
    }


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


def _are_texts(answers: Counter[str]) -> bool:
    """Whether these answers are texts, hardly any two alike, and not words to choose from."""
    once = sum(count == 1 for count in answers.values())
    return len(answers) > MANY_ANSWERS and 2 * once > len(answers)
