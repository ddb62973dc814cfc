"""The main job, end to end, on a laptop: `alora demo`.

In:   nothing but the packages: SmolLM2-135M and four real data sets come from PyPI.
Out:  an adapter folder, accuracies before and after beside the majority baseline, a mixed-task batch of
      answers, and a table of speeds measured in the same run.
Who:  people who have just installed the package.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.panel import Panel

from ..modules.tasks import BASE
from . import comparison, display, train
from .recipe import Recipe

RECIPE = Recipe(
    tasks=("trec", "movie", "spam", "bbc"),
    output="runs/demo",
    r=8,
    lora_alpha=16,
    steps=36,
    batch_size=24,
    learning_rate=1e-3,
    train_size=1500,
    test_size=64,
    max_length=48,  # a batch is padded to its longest row: long news articles would slow the short questions down
)


def run(recipe: Recipe, *, compare: bool = True) -> None:
    """Train on several tasks at once, judge, save, answer a mixed batch, measure."""
    started = time.perf_counter()
    names = ", ".join(str(task) for task in recipe.tasks)
    routing = "one A per task" if recipe.routing == "task" else f"{recipe.num_experts} A under a learned router"
    display.console.print(
        Panel.fit(f"[bold]ALoRA[/bold]: {names}\nmixed in every batch, {routing}, one shared B on every linear layer")
    )
    job = train.load(recipe)
    trainable, total = job.model.get_nb_trainable_parameters()
    display.console.print(
        f"{recipe.model}: {trainable / 1e6:.2f} M of {total / 1e6:.0f} M parameters train;"
        f" {len(job.train)} train and {len(job.test)} test rows"
    )
    before = train.judge(job, "base, untuned", base_only=True)
    trainer = train.trainer_for(job, save=False)
    trainer.train()
    after = train.judge(job, "ALoRA")
    train.show_scores(job, before, after)
    folder = Path(recipe.output) / "adapter"
    train.save(job, folder, trainer)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.suffix == ".safetensors")
    display.console.print(f"adapter saved: {folder} ({size / 1e6:.1f} MB)\n")
    answer_mixed_batch(job)
    if compare:
        comparison.show(job)
    display.console.print(f"\ndone in {time.perf_counter() - started:.0f} s; again with: alora eval {folder}")


@torch.no_grad()
def answer_mixed_batch(job: train.Run) -> None:
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
        (task, _shorten(row["prompt"]), " ".join(answer.split()), row["answer"])
        for (task, row), answer in zip(rows, answers, strict=True)
    ]
    shown = display.table("one generate call, a task per row", ("task", "prompt", "answer", "truth"), cells)
    for column in shown.columns:
        column.justify = "left"
    display.console.print(shown)


def _shorten(prompt: str, width: int = 60) -> str:
    """The text of a prompt without its instruction line."""
    text = " ".join(prompt.splitlines()[0].split())
    return text if len(text) <= width else text[: width - 1] + "…"


def with_options(routing: str, steps: int | None, output: Path | None, seed: int, model: str | None) -> Recipe:
    """The demo's recipe with what the command line changes."""
    return RECIPE.instead(routing=routing, steps=steps, output=str(output) if output else None, seed=seed, model=model)
