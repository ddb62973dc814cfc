"""How good a `Run` is: scores on its test rows as numbers, tables and the model card.

A task's accuracy where it answers with few words, the loss of its answers where they are texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import data, precision
from ..adapters.cards import read_task_cards
from ..adapters.method import ROUTED
from ..baselines.methods import base_alone
from ..settings import write_yaml
from ..text import percent
from ..training import answer_loss, choice_accuracy
from ..tuner.card import model_card
from ..tuner.config import CARD, ALoRAConfig
from . import display
from .job import ADAPTER, Run, load
from .recipe import FILE, load_recipe


@dataclass(frozen=True)
class Scores:
    """What a model is worth on the test rows."""

    accuracy: dict[str, float] = field(default_factory=dict)  # task -> share of right choices among words
    loss: dict[str, float] = field(default_factory=dict)  # task -> nats per token of an answer in text


def evaluate(adapter: Path, *, base: bool = False, dtype: str | None = None) -> None:
    """Judge an adapter that `run` saved, and the untuned base too if asked; in the dtype of its training or another."""
    if not (adapter / FILE).exists():
        near = f", {adapter / ADAPTER}" if (adapter / ADAPTER / FILE).exists() else ""
        raise ValueError(f"{adapter} has no {FILE}: give the adapter folder that `alora train` or `demo` wrote{near}")
    recipe = load_recipe(adapter / FILE, root=Path())  # older copies hold paths from here
    if recipe.dtype == precision.AUTO:  # and no dtype: they were trained in this one
        recipe = recipe.instead(dtype="float32")
    job = load(recipe.instead(dtype=dtype), adapter, whose="as trained" if dtype is None else "asked for")
    before = judge(job, "base, untuned", base_only=True) if base else None
    show_scores(job, before, judge(job, job.label))


def judge(run: Run, label: str, *, base_only: bool = False) -> Scores:
    """Scores on the test rows, all tasks mixed in every batch; `base_only` judges the base without its adapter."""
    rows = [
        _with_word(run, dict(row), answer) for row, answer in zip(run.test, run.text["test"]["answer"], strict=True)
    ]
    texts = [row for row in rows if row["task"] not in run.choices]
    with display.progress("rows") as bar, base_alone(run.model) if base_only else nullcontext():
        task = bar.add_task(label, total=len(rows), note="")
        how: dict[str, Any] = {
            "tasks": run.tasks if run.method.name in ROUTED and not base_only else None,
            "pad_token_id": run.tokenizer.pad_token_id or 0,
            "on_batch": lambda done: bar.advance(task, done),
        }
        choices = {name: list(words.values()) for name, words in run.choices.items()}
        ends, per_token = run.tokenizer.eos_token_id, run.recipe.label_score == "mean"
        accuracy = choice_accuracy(run.model, rows, choices, eos_token_id=ends, per_token=per_token, **how)
        return Scores(accuracy, answer_loss(run.model, texts, **how) if texts else {})


def _with_word(run: Run, row: dict[str, Any], answer: str) -> dict[str, Any]:
    """A row whose answer has the tokens of its label word, which some prompts make a tokenizer divide otherwise."""
    word = run.choices.get(row["task"], {}).get(answer)
    if word is None:
        return row
    end = () if run.tokenizer.eos_token_id is None else (run.tokenizer.eos_token_id,)
    prompt = row["input_ids"][: sum(label == data.IGNORE for label in row["labels"])]
    return {**row, "input_ids": [*prompt, *word, *end], "labels": [data.IGNORE] * len(prompt) + [*word, *end]}


def show_scores(run: Run, before: Scores | None, after: Scores) -> None:
    """Accuracies beside the majority baseline, losses of texts below, each beside the untuned base if it was judged."""
    judged = {**({"base, untuned": before} if before else {}), run.label: after}
    if after.accuracy:
        shares = {"majority": data.majority_baseline(run.text)} | {name: s.accuracy for name, s in judged.items()}
        _show(run, "accuracy: choice among the task's label words", shares, percent)
    if after.loss:
        losses = {name: scores.loss for name, scores in judged.items()}
        _show(run, "answers in text: loss per token (perplexity)", losses, _with_perplexity)


def _show(run: Run, title: str, columns: Mapping[str, Mapping[str, float]], form: Callable[[float], str]) -> None:
    """A table with a row per task that the run's own column knows, and their mean."""
    names = [name for name in run.tasks if name in columns[run.label]]
    counts = Counter(run.test["task"])
    values = [[name, str(counts[name]), *(form(column[name]) for column in columns.values())] for name in names]
    means = [form(sum(column[name] for name in names) / len(names)) for column in columns.values()]
    rows = [[*row[:-1], f"[bold]{row[-1]}[/bold]"] for row in [*values, ["mean", "", *means]]]
    display.console.print(display.table(title, ("task", "test rows", *columns), rows))


def _with_perplexity(loss: float) -> str:
    return f"{loss:.3f} ({math.exp(loss):.1f})"


def describe(run: Run, folder: Path, before: Scores | None, after: Scores) -> None:
    """The model card of a saved adapter: how its tasks are asked, what they score, the recipe without its paths."""
    config, path = getattr(run.model, "peft_config", {}).get("default"), folder / CARD
    if not isinstance(config, ALoRAConfig):
        return
    asked = {task: card.template for task, card in read_task_cards(folder, run.tasks).items() if card.template}
    judged = [scores for scores in (before, after) if scores]
    table = "| task | measure |" + " base |" * (len(judged) - 1) + " adapter |\n|---|---|" + "---:|" * len(judged)
    for measure, form in (("accuracy", percent), ("loss", "{:.3f}".format)):
        columns: list[dict[str, float]] = [getattr(scores, measure) for scores in judged]
        for task in columns[-1]:
            table += f"\n| {task} | {measure} | {' | '.join(form(column[task]) for column in columns)} |"
    recipe = run.recipe.model_dump(mode="json", exclude={"output", "model"}, exclude_defaults=True)
    recipe |= {"tasks": [data.as_source(task).name for task in run.recipe.tasks], "dtype": run.recipe.dtype}
    more = f"\n## Scores on test rows\n\n{table}\n\n## Recipe\n\n```yaml\n{write_yaml(recipe)}```\n"
    named = run.recipe.model if run.recipe.model in data.MODELS else None
    text = model_card(config, path.read_text(encoding="utf-8"), named=named, asked=asked, more=more)
    path.write_text(text, encoding="utf-8")
