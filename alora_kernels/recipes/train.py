"""Follow a recipe: load, train, judge, save: `alora train`. Each step prints its own progress."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .. import data
from ..adapters.cards import write_task_cards
from ..adapters.method import ROUTED
from ..analysis import ConflictCallback, probe_batches
from ..baselines.methods import save_method, trainable_parameters
from ..training import ALoRATrainer
from . import display
from .job import ADAPTER, Run, load
from .judge import describe, judge, save_metrics, show_scores
from .recipe import Recipe

CONFLICTS = "conflicts.csv"  # in the output folder
PROBE_ROWS = 8  # of each task, in a measurement of gradient conflicts


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
        save_metrics(job, folder / ADAPTER, None, scores)
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
    write_task_cards(
        folder, data.task_cards(run.recipe.tasks, run.text, words, run.recipe.chat_template) if routed else {}
    )
    (folder / "losses.json").write_text(json.dumps(trainer.state.log_history, indent=1))
