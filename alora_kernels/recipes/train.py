"""Follow a recipe: load, train, judge, save. The steps that `alora train`, `alora eval` and the demo share.

From a `Recipe` to a `Run` (model, tokenizer, encoded rows), an adapter folder and scores: a task's accuracy where it
answers with few words, the loss of its answers where they are texts. Each step prints its own progress.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .. import data, precision
from ..adapters.cards import read_task_cards, write_task_cards
from ..adapters.method import METHODS, ROUTED, Method, read_method
from ..analysis import ConflictCallback, probe_batches
from ..baselines.methods import (
    adapt,
    as_large_as_alora,
    base_alone,
    load_method,
    parameters_of,
    save_method,
    target_shapes,
    tasks_of,
    trainable_parameters,
)
from ..settings import write_yaml
from ..text import percent
from ..training import ALoRATrainer, answer_loss, choice_accuracy
from ..training.evaluate import whole_words
from ..tuner.card import model_card
from ..tuner.config import CARD, CONFIG, ALoRAConfig
from . import display
from .recipe import FILE, Recipe, load_recipe

ADAPTER, CONFLICTS = "adapter", "conflicts.csv"  # in the output folder
PROBE_ROWS = 8  # of each task, in a measurement of gradient conflicts
MANY_ANSWERS = 16  # a task with more different answers, most of them seen once, answers in texts


@dataclass(frozen=True)
class Scores:
    """What a model is worth on the test rows."""

    accuracy: dict[str, float] = field(default_factory=dict)  # task -> share of right choices among words
    loss: dict[str, float] = field(default_factory=dict)  # task -> nats per token of an answer in text


@dataclass
class Run:
    """Everything a recipe becomes once loaded."""

    recipe: Recipe
    method: Method  # the rank as the recipe's budget chose it
    tasks: tuple[str, ...]  # names in the order of their ids
    model: Any  # the base with the adapter (a `PeftModel` for ALoRA and LoRA)
    tokenizer: Any
    text: DatasetDict  # rows as text; `train` and `test` are the same rows as token ids
    train: Dataset
    test: Dataset
    choices: dict[
        str, dict[str, tuple[int, ...]]
    ]  # task -> its words -> their token ids; no tasks that answer in texts
    alora_parameters: int  # how many ALoRA of the recipe's rank trains, the measure of `budget: parameters`

    @property
    def label(self) -> str:
        """How tables call the method."""
        return METHODS[self.method.name]


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the recipe says, save, judge; returns the adapter's folder. `resume` and `overwrite` as `claim`.

    Every process of torchrun or accelerate launch calls this; the first writes and prints, all judge.
    """
    folder, processes = Path(recipe.output), join(recipe)
    last = claim(folder, resume=resume, overwrite=overwrite)
    job = load(recipe, resume=last)
    show_method(job)
    if overwrite and processes.is_main_process:
        clear(folder)
    trainer = trainer_for(job, save=True)
    trainer.train(resume_from_checkpoint=last)
    save(job, folder / ADAPTER, trainer)
    scores = judge(job, job.label)
    show_scores(job, None, scores)
    if processes.is_main_process:
        describe(job, folder / ADAPTER, None, scores)
    processes.wait_for_everyone()
    processes.destroy_process_group()
    return folder / ADAPTER


def join(recipe: Recipe) -> PartialState:
    """The processes that were started together; a ValueError where the recipe cannot be shared out among them."""
    launched = "LOCAL_RANK" in os.environ
    processes = PartialState(cpu=launched and not torch.cuda.is_available())  # else accelerate leaves each one alone
    if recipe.parallel == "fsdp" and processes.distributed_type == DistributedType.NO:
        raise ValueError(
            "parallel: fsdp shards the base over processes, and this is one alone: start it with torchrun"
            " --nproc-per-node N -m alora_kernels train recipe.yaml, or say parallel: ddp"
        )
    if recipe.batch_size % processes.num_processes:
        raise ValueError(
            f"batch_size: {recipe.batch_size} rows of a step cannot be dealt evenly to {processes.num_processes}"
            " processes: choose a multiple"
        )
    return processes


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


def claim(folder: Path, *, resume: bool = False, overwrite: bool = False) -> str | None:
    """The checkpoint to go on from in an output folder; None starts anew.

    Nothing is replaced that the user did not mean to: a ValueError where a finished or begun run is there and neither
    `resume` nor `overwrite` was said, or where there is nothing to resume.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with the run that is there, --overwrite starts anew: give one of them")
    place = folder.resolve()  # x/../run is run, even while there is no x
    if not next(p for p in (place, *place.parents) if p.exists()).is_dir():
        raise ValueError(f"output: {folder} is, or lies below, a file; give the path of a folder")
    last = get_last_checkpoint(str(place)) if place.is_dir() else None
    finished = (place / ADAPTER).is_dir() and any((place / ADAPTER).iterdir())
    if resume and last is None:
        again = "with --overwrite, or into another --output" if finished else "without --resume"
        raise ValueError(
            f"no checkpoint in {folder} to resume from: train {again}; save_steps in the recipe makes them"
        )
    if resume or overwrite:
        return last if resume else None
    if finished or last or (place / CONFLICTS).exists():
        what = f"a finished adapter, {folder / ADAPTER}" if finished else "a run that has begun"
        on = "--resume goes on from its last checkpoint, " if last else ""
        raise ValueError(f"{folder} holds {what}: {on}--overwrite replaces it, --output writes to another folder")
    return None


def clear(folder: Path) -> None:
    """Remove checkpoints and measurements of an earlier run; its adapter stays until the new one replaces it."""
    for old in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(old)
    (folder / CONFLICTS).unlink(missing_ok=True)


def load(recipe: Recipe, adapter: Path | None = None, resume: str | None = None, whose: str = "asked for") -> Run:
    """Base, data and adapter: a fresh adapter, or the one in a folder; tasks in the order of a run that goes on.

    The run's recipe has the dtype that `auto` became, so that the copy beside the adapter says it; `whose` wish another
    dtype was, see `precision.explain`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # `auto` is measured, so that processes might choose differently: the first chooses for all
    chosen = broadcast_object_list([precision.explain(device, recipe.dtype, whose)])[0]
    recipe = recipe.instead(dtype=chosen.name)
    lost = data.Lost()
    with display.err.status("reading data ..."):
        text = data.load_tasks(
            recipe.tasks, seed=recipe.seed, train_size=recipe.train_size, test_size=recipe.test_size, lost=lost
        )
    display.say(f"base in {chosen.name} ({chosen.reason})", "dim")
    base, tokenizer = data.load_model(recipe.model, dtype=chosen.dtype)  # says itself what takes long
    with display.err.status("preparing adapter and tokens ..."):
        tasks = _task_order(recipe, text, resume)
        method = recipe.adapters(tasks)
        shapes = target_shapes(base, method)
        if recipe.budget == "parameters":
            method = as_large_as_alora(method, shapes)
        set_seed(recipe.seed)
        model: Any
        if adapter is None:
            model = adapt(base, method)
        else:
            method = read_method(adapter) or method
            model = load_method(base, adapter)
            tasks = tasks_of(model) or tasks
        if recipe.parallel == "ddp" or adapter is not None:  # FSDP takes a part of each layer there
            model.to(device)
        train = data.encode(text["train"], tokenizer, recipe.max_length, lost=lost)
        test = data.encode(text["test"], tokenizer, recipe.max_length, lost=lost)
    cues = dict(zip(text["train"]["task"], text["train"]["prompt"], strict=True))  # one prompt of each task
    choices = {task: data.word_tokens(labels, tokenizer, cues[task]) for task, labels in _words(text).items()}
    for line in (*lost.lines(), *_unseen(text, choices, tokenizer)):
        display.say(line, "dim")
    count = parameters_of("alora", recipe.r, shapes, tasks=len(tasks), num_experts=recipe.num_experts)
    return Run(recipe, method, tasks, model, tokenizer, text, train, test, choices, count)


def _task_order(recipe: Recipe, text: DatasetDict, resume: str | None) -> tuple[str, ...]:
    """Names of the tasks in the data: a checkpoint's if they are the same, else the recipe's and what files add."""
    named = [data.as_source(task).name for task in recipe.tasks]
    present = set(text["train"]["task"])
    config = Path(resume, CONFIG) if resume else None
    saved = json.loads(config.read_text(encoding="utf-8")).get("tasks") if config and config.is_file() else None
    if saved and set(saved) == present:
        return tuple(saved)
    return (*(name for name in named if name in present), *sorted(present - set(named)))


def _words(text: DatasetDict) -> dict[str, list[str]]:
    """Each task's answer words: a built-in task's label words, else the answers seen in training."""
    answers: dict[str, Counter[str]] = {}
    for task, answer in zip(text["train"]["task"], text["train"]["answer"], strict=True):
        answers.setdefault(task, Counter())[answer] += 1
    return {
        name: list(data.labels_of(name) if name in data.TASKS else seen)
        for name, seen in sorted(answers.items())
        if name in data.TASKS or not _are_texts(seen)
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


def trainer_for(run: Run, *, save: bool) -> ALoRATrainer:
    """The trainer a recipe describes, with a progress bar."""
    recipe, processes = run.recipe, PartialState()
    sharded: Any = recipe.parallel == "fsdp"  # transformers' type is of its older spelling
    args = TrainingArguments(
        output_dir=recipe.output,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // processes.num_processes,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        save_strategy="steps" if save and recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        logging_steps=max(1, recipe.steps // 12),
        seed=recipe.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=processes.device.type == "cpu",
        fsdp=sharded,
    )
    trainer = ALoRATrainer(
        model=run.model,
        args=args,
        train_dataset=run.train,
        processing_class=run.tokenizer,
        task_temperature=recipe.temperature,
        callbacks=[TrainingBar()],
    )
    trainer.remove_callback(PrinterCallback)
    if save and recipe.conflict_steps:
        probes = probe_batches(run.test, trainer.data_collator, PROBE_ROWS)
        file = Path(recipe.output) / CONFLICTS
        trainer.add_callback(ConflictCallback(trainer.compute_loss, probes, file, every=recipe.conflict_steps))
    return trainer


class TrainingBar(TrainerCallback):
    """A bar with the loss while training, and a line with the loss of each task at every log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, where training resumes."""
        self.bar = display.progress("steps")
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the losses; the last log of a training has none."""
        if "loss" in logs:
            per_task = "  ".join(f"{k[5:]} {v:.2f}" for k, v in logs.items() if k.startswith("loss_"))
            loss = f"loss {logs['loss']:.3f}"
            self.bar.update(self.task, note=loss)
            self.bar.console.print(f"step {state.global_step:>4}  {loss}  [dim]{per_task}[/dim]", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.bar.stop()


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


def show_method(run: Run) -> None:
    """Print one line: the method, what it trains, and how its rank was chosen."""
    count = trainable_parameters(run.model)
    text = f"{run.label}: r={run.method.r}, {count / 1e6:.3g} M parameters train"
    if run.recipe.budget == "parameters":
        share = 100 * count / run.alora_parameters
        text += f", {share:.1f} % of the {run.alora_parameters / 1e6:.3g} M of ALoRA with r={run.recipe.r}"
    display.say(text)


def save(run: Run, folder: Path, trainer: ALoRATrainer) -> None:
    """The adapter as safetensors; beside it the recipe, how tasks were asked, and each task's losses as JSON.

    All processes call this, and the first one writes.
    """
    state = trainer.accelerator.get_state_dict(run.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    record = {
        "budget": run.recipe.budget,
        "trainable_parameters": trainable_parameters(run.model),
        "alora_parameters": run.alora_parameters,
    }
    save_method(run.model, folder, run.method, record, state)
    run.recipe.save(folder)
    routed = run.method.name in ROUTED  # elsewhere no task can be asked for by name
    words = {task: list(ids) for task, ids in run.choices.items()}
    write_task_cards(folder, data.task_cards(run.recipe.tasks, run.text, words) if routed else {})
    (folder / "losses.json").write_text(json.dumps(trainer.state.log_history, indent=1))


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
