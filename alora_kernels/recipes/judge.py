"""How good a `Run` is: scores on its test rows, each task's by its own measure; as numbers, tables and a card."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from datasets import DatasetDict

from .. import data, precision
from ..adapters.asking import answer_ends, special_tokens
from ..adapters.cards import described, read_task_cards
from ..adapters.method import ROUTED
from ..baselines.methods import base_alone
from ..settings import write_yaml
from ..text import percent, printable
from ..training import answer_loss, choice_accuracy
from ..training.answers import exact_match, number_match, rouge, written_answers
from ..training.evaluate import last_turn
from ..tuner.card import model_card
from ..tuner.config import CARD, ALoRAConfig
from ..version import __version__
from . import display
from .job import ADAPTER, Run, load, read
from .recipe import FILE, Recipe, load_recipe

METRICS = "metrics.json"  # beside the adapter
ALL = 10**9  # test rows
GUESSED = ("choice", "exact")  # what the most frequent answer can be right in
SLACK = 8  # tokens that a written answer may have above the longest right one and its quarter
OTHER = "(no word of the task)"


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


@dataclass(frozen=True)
class Scores:
    """What a model is worth on the test rows."""

    by: dict[str, dict[str, float]]  # metric of `MEASURES`, or rouge1, rouge2 -> task -> the mean over its rows
    unfinished: dict[str, int] = field(default_factory=dict)  # task -> written answers that had not ended in time
    chosen: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)  # task -> (right, chosen) words -> rows

    @property
    def accuracy(self) -> dict[str, float]:
        """Task -> share of right choices among its label words."""
        return self.by.get("choice", {})


def evaluate(
    adapter: Path,
    *,
    base: bool = False,
    dtype: str | None = None,
    rows: Path | None = None,
    limit: int | None = None,
    confusion: bool = False,
) -> dict[str, Any]:
    """Judge an adapter that `run` saved, and the untuned base too if asked; in the dtype of its training or another.

    `rows` is a file or recipe whose rows judge instead; `limit` takes the first so many of each task. Prints tables,
    and gives what `metrics.json` holds.
    """
    if not (adapter / FILE).exists():
        near = f", {adapter / ADAPTER}" if (adapter / ADAPTER / FILE).exists() else ""
        raise ValueError(f"{adapter} has no {FILE}: give the adapter folder that `alora train` or `demo` wrote{near}")
    recipe = load_recipe(adapter / FILE, root=Path())  # older copies hold paths from here
    if recipe.dtype == precision.AUTO:  # and no dtype: they were trained in this one
        recipe = recipe.instead(dtype="float32")
    asked = recipe if rows is None else _judged_on(recipe, rows)
    job = load(asked.instead(dtype=dtype), adapter, whose="as trained" if dtype is None else "asked for")
    if rows is not None:
        say_learnt(adapter, job)
    if limit is not None:
        job = _limited(job, limit)
    before = judge(job, "base, untuned", base_only=True) if base else None
    after = judge(job, job.label)
    show_scores(job, before, after)
    if confusion:
        show_confusion(after)
    return metrics(job, adapter, before, after)


def _judged_on(recipe: Recipe, rows: Path) -> Recipe:
    """The recipe with other test rows: all of a file, in the format of its one task, or those of another recipe."""
    if rows.suffix in (".yaml", ".yml"):
        other = load_recipe(rows)
        return recipe.instead(tasks=other.tasks, test_size=other.test_size, seed=other.seed)
    task, *more = recipe.tasks
    if more or isinstance(task, str):
        raise ValueError(
            f"--data {rows}: this adapter was trained on {len(recipe.tasks)} entries of tasks, and which of them a file"
            " is of cannot be seen: give a recipe whose tasks have test_split"
        )
    return recipe.instead(tasks=(replace(task, test_split=str(rows.resolve())),), test_size=ALL)


def say_learnt(adapter: str | Path | None, run: Run) -> None:
    """Say how many rows judge that an adapter, or one it goes on from, was trained on, where its rows can be read."""
    learnt: set[tuple[str, str, str]] = set()
    seen: set[Path] = set()
    while adapter is not None and (folder := Path(adapter).resolve()) not in seen:
        seen.add(folder)
        try:
            trained = load_recipe(folder / FILE, root=Path())
            rows = read(trained, data.Lost())["train"]
        except (OSError, ValueError):
            break
        own = None if trained.train_b else trained.train_tasks
        learnt.update((r["task"], r["prompt"], r["messages"]) for r in rows if own is None or r["task"] in own)
        adapter = trained.adapter
    test = run.text["test"]
    if counts := Counter(r["task"] for r in test if (r["task"], r["prompt"], r["messages"]) in learnt):
        said = ", ".join(f"{task} {count}" for task, count in counts.items())
        display.say(f"rows that this adapter was trained on judge it here: {said}", "yellow")


def _limited(run: Run, limit: int) -> Run:
    """The run with the first so many test rows of each task."""
    places = run.text["test"].to_pandas().groupby("task").cumcount()
    kept = [at for at, place in enumerate(places) if place < limit]
    text = DatasetDict({**run.text, "test": run.text["test"].select(kept)})
    return replace(run, text=text, test=run.test.select(kept))


def judge(run: Run, label: str, *, base_only: bool = False) -> Scores:
    """Scores on the test rows, all tasks mixed in every batch; `base_only` judges the base without its adapter."""
    words = _words(run)
    rows = [
        _with_word(run, words, last_turn(row), answer)
        for row, answer in zip(run.test, run.text["test"]["answer"], strict=True)
    ]
    parts: dict[str, list[Any]] = {"choice": [], "written": [], "loss": []}
    for row in rows:
        metric = run.metrics[row["task"]]
        parts["written" if metric in WRITTEN else metric].append(row)
    scores = Scores({})
    with display.progress("rows") as bar, base_alone(run.model) if base_only else nullcontext():
        task = bar.add_task(label, total=len(rows), note="")
        how: dict[str, Any] = {
            "tasks": run.tasks if run.method.name in ROUTED and not base_only else None,
            "pad_token_id": run.tokenizer.pad_token_id or 0,
            "on_batch": lambda done: bar.advance(task, done),
        }
        if parts["choice"]:
            scores.by["choice"] = _choose(run, words, parts["choice"], scores, how)
        if parts["loss"]:
            scores.by["loss"] = answer_loss(run.model, parts["loss"], **how)
        if parts["written"]:
            _write(run, parts["written"], scores, how)
    return scores


def _words(run: Run) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tasks' label words as their rows hold them: of a chat the whole turn, with what ends it."""
    chats = {task for task, turns in data.by_task(run.text["test"], "messages").items() if any(turns)}
    chats &= set(run.choices)
    words: dict[str, dict[str, tuple[int, ...]]] = {**run.choices, **{task: {} for task in chats}}
    trained = zip(run.text["train"]["task"], run.text["train"]["answer"], strict=True) if chats else ()
    for at, (task, answer) in enumerate(trained):
        if task in chats and answer not in words[task]:
            words[task][answer] = tuple(_answer(last_turn(run.train[at])))
    return words


def _answer(row: Mapping[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != data.IGNORE]


def _with_word(run: Run, words: Mapping[str, Mapping[str, tuple[int, ...]]], row: Any, answer: str) -> dict[str, Any]:
    """A row whose answer has the tokens of its label word, which some prompts make a tokenizer divide otherwise."""
    row = {**row, "answer": answer}
    own = words.get(row["task"], {})
    if answer not in own or own is not run.choices[row["task"]]:  # a chat's are its rows' already
        return row
    word, prompt = own[answer], _prompt(row)
    end = () if run.tokenizer.eos_token_id is None else (run.tokenizer.eos_token_id,)
    return {**row, "input_ids": [*prompt, *word, *end], "labels": [data.IGNORE] * len(prompt) + [*word, *end]}


def _prompt(row: Mapping[str, Any]) -> list[int]:
    """The ids before the answer."""
    first = next((at for at, label in enumerate(row["labels"]) if label != data.IGNORE), len(row["labels"]))
    return list(row["input_ids"][:first])


def _choose(run: Run, words: Mapping[str, Any], rows: Sequence[Any], scores: Scores, how: Any) -> dict[str, float]:
    """Accuracies by task; which word was chosen where goes into the scores."""
    names = {name: list(own) for name, own in words.items() if run.metrics.get(name) == "choice"}
    choices = {name: list(words[name].values()) for name in names}

    def chose(task: str, right: int | None, chosen: int) -> None:
        pair = OTHER if right is None else names[task][right], names[task][chosen]
        scores.chosen.setdefault(task, Counter())[pair] += 1

    ends, per_token = run.tokenizer.eos_token_id, run.recipe.label_score == "mean"
    return choice_accuracy(run.model, rows, choices, eos_token_id=ends, per_token=per_token, on_choice=chose, **how)


def _write(run: Run, rows: Sequence[Any], scores: Scores, how: Any) -> None:
    """Have the model write answers, and put their measures by task into the scores."""
    longest = max(len(_answer(row)) for row in rows)
    prompts = [{"input_ids": _prompt(row), "task": row["task"]} for row in rows]
    limit = longest + longest // 4 + SLACK
    written = written_answers(run.model, prompts, ends=_ends(run, rows), max_tokens=limit, **how)
    found: dict[str, dict[str, list[float]]] = {}
    for row, (ids, ended) in zip(rows, written, strict=True):
        answer, right = (run.tokenizer.decode(some, skip_special_tokens=True) for some in (ids, _answer(row)))
        # such as the empty thoughts that a chat template puts before an answer
        answer = answer.removeprefix(right[: max(0, right.rfind(row["answer"].strip()))])
        for name, value in WRITTEN[run.metrics[row["task"]]](answer, row["answer"]).items():
            found.setdefault(name, {}).setdefault(row["task"], []).append(value)
        if not ended:
            scores.unfinished[row["task"]] = scores.unfinished.get(row["task"], 0) + 1
    for name, tasks in found.items():
        scores.by[name] = {task: sum(values) / len(values) for task, values in tasks.items()}


def _ends(run: Run, rows: Sequence[Any]) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the model's own, and a chat's end of turn."""
    turns = {_answer(row)[-1] for row in rows} & set(special_tokens(run.tokenizer).values())
    return sorted(turns.union(answer_ends(run.model, run.tokenizer)))


def show_scores(run: Run, before: Scores | None, after: Scores) -> None:
    """A table per measure: each task beside the majority's answer, where that can be right, and the untuned base."""
    judged = {**({"base, untuned": before} if before else {}), run.label: after}
    for name, measure in MEASURES.items():
        if name not in after.by:
            continue
        columns = {label: scores.by[name] for label, scores in judged.items()}
        if name in GUESSED:
            columns = {"majority": data.majority_baseline(run.text), **columns}
        _show(run, measure.title, columns, measure.show)
    if after.unfinished:
        said = ", ".join(f"{task} {count}" for task, count in after.unfinished.items())
        display.say(f"written answers cut at their limit, judged as far as they went: {said}", "dim")


def _show(run: Run, title: str, columns: Mapping[str, Mapping[str, float]], form: Callable[[float], str]) -> None:
    """A table with a row per task that the run's own column knows, and their mean."""
    names = [name for name in run.tasks if name in columns[run.label]]
    counts = Counter(run.test["task"])
    values = [[name, str(counts[name]), *(form(column[name]) for column in columns.values())] for name in names]
    means = [form(sum(column[name] for name in names) / len(names)) for column in columns.values()]
    rows = [[*row[:-1], f"[bold]{row[-1]}[/bold]"] for row in [*values, ["mean", "", *means]]]
    display.console.print(display.table(title, ("task", "test rows", *columns), rows))


def show_confusion(scores: Scores) -> None:
    """For each task of label words how often which was chosen, a row for each right one."""
    for task, pairs in scores.chosen.items():
        rights, words = (sorted({pair[at] for pair in pairs}) for at in (0, 1))
        cells = [[printable(right, 30), *(str(pairs[right, word] or "-") for word in words)] for right in rights]
        columns = ("right / chosen", *(printable(word, 30) for word in words))
        display.console.print(display.table(task, columns, cells))


def metrics(run: Run, adapter: Path, before: Scores | None, after: Scores) -> dict[str, Any]:
    """The scores with what they are of, as `metrics.json` and `alora eval --json` hold them."""
    counts, majority = Counter(run.test["task"]), data.majority_baseline(run.text)
    judged = {"score": after, **({"base": before} if before else {})}
    tasks: dict[str, dict[str, Any]] = {}
    for task in (name for name in run.tasks if counts[name]):
        metric = run.metrics[task]
        found = {label: scores.by[metric].get(task, math.nan) for label, scores in judged.items()}
        found |= {"majority": majority[task]} if metric in GUESSED else {}
        found |= {name: after.by[name][task] for name in ("rouge1", "rouge2") if metric == "rouge"}
        tasks[task] = {"metric": metric, "rows": counts[task]}
        tasks[task] |= {label: None if math.isnan(value) else value for label, value in found.items()}
        tasks[task] |= {"unfinished": after.unfinished.get(task, 0)} if metric in WRITTEN else {}
    means: dict[str, Any] = {}
    for metric in dict.fromkeys(own["metric"] for own in tasks.values()):
        own = [task for task in tasks.values() if task["metric"] == metric and None not in task.values()]
        means[metric] = {label: statistics.fmean(task[label] for task in own) if own else None for label in judged}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")} | {"alora-kernels": __version__}
    head = {"adapter": str(adapter), "method": run.method.name, "model": run.recipe.model, "dtype": run.recipe.dtype}
    return {**head, "tasks": tasks, "mean": means, "versions": versions}


def save_metrics(run: Run, folder: Path, before: Scores | None, after: Scores) -> None:
    """`metrics.json` beside the adapter."""
    text = json.dumps(metrics(run, folder, before, after), indent=1, ensure_ascii=False)
    (folder / METRICS).write_text(text + "\n", encoding="utf-8")


def describe(run: Run, folder: Path, before: Scores | None, after: Scores) -> None:
    """The model card of a saved adapter: how its tasks are asked, what they score, the recipe without its paths."""
    config, path = getattr(run.model, "peft_config", {}).get("default"), folder / CARD
    if not isinstance(config, ALoRAConfig):
        return
    asked = {t: said for t, card in read_task_cards(folder, run.tasks).items() if (said := described(card))}
    judged = [scores for scores in (before, after) if scores]
    table = "| task | measure |" + " base |" * (len(judged) - 1) + " adapter |\n|---|---|" + "---:|" * len(judged)
    for metric in (name for name in MEASURES if name in after.by):
        for task in after.by[metric]:
            shown = " | ".join(MEASURES[metric].show(scores.by[metric][task]) for scores in judged)
            table += f"\n| {task} | {MEASURES[metric].name} | {shown} |"
    recipe = run.recipe.model_dump(mode="json", exclude={"output", "model", "adapter"}, exclude_defaults=True)
    recipe |= {"tasks": [data.as_source(task).name for task in run.recipe.tasks], "dtype": run.recipe.dtype}
    more = f"\n## Scores on test rows\n\n{table}\n\n## Recipe\n\n```yaml\n{write_yaml(recipe)}```\n"
    named = run.recipe.model if run.recipe.model in data.MODELS else None
    text = model_card(config, path.read_text(encoding="utf-8"), named=named, asked=asked, more=more)
    path.write_text(text, encoding="utf-8")
