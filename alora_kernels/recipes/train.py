"""Follow a recipe: load, train, judge, save: `alora train`. Each step prints its own progress."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import data
from ..adapters.cards import read_task_cards, write_task_cards
from ..adapters.method import ROUTED
from ..analysis import ConflictCallback, probe_batches
from ..baselines.methods import save_method, trainable_parameters
from ..files import claimed
from ..training import ALoRATrainer
from ..training.checkpoints import WRITING, newest_whole
from . import display
from .job import ADAPTER, Run, check_packages, load, schedule
from .judge import METRICS, describe, judge, save_metrics, say_learnt, show_scores
from .plan import peak
from .recipe import Recipe
from .watch import LOSSES, PICTURE, LossFile, TrainingBar, draw

CONFLICTS = "conflicts.csv"  # in the output folder
OPTIMIZERS = {"adamw": TrainingArguments.default_optim}  # recipe's name -> transformers'
SCHEDULERS = {"constant": "constant_with_warmup"}  # the one without forgets the warm-up
#: keys that transformers calls the same
SAME = {"gradient_checkpointing", "learning_rate", "weight_decay", "max_grad_norm", "save_total_limit", "seed"}
PROBE_ROWS = 8  # of each task, in a measurement of gradient conflicts


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as the recipe says, save, judge; returns the adapter's folder. `resume` and `overwrite` as `claim`.

    Every process of torchrun or accelerate launch calls this; the first writes and prints, all judge.
    """
    folder, processes, overwrite = Path(recipe.output), join(recipe), overwrite or (recipe.overwrite and not resume)
    needed = {"optimizer": "8bit" in recipe.optimizer, "load_in": recipe.load_in is not None}
    bits = {key: "bitsandbytes" for key, is_so in needed.items() if is_so}
    check_packages(bits | {f"report_to: {name}": name for name in recipe.report_to})
    last = claim(folder, resume=resume, overwrite=overwrite)
    with claimed(folder) if processes.is_main_process else nullcontext():
        _follow(recipe, folder, processes, last, overwrite)
    processes.wait_for_everyone()
    processes.destroy_process_group()
    return folder / ADAPTER


def _follow(recipe: Recipe, folder: Path, processes: PartialState, last: str | None, overwrite: bool) -> None:
    """All steps of a run in a folder that is this run's alone."""
    job = load(recipe, resume=last)
    if job.start:
        say_learnt(job.start.file.folder, job)
    show_method(job)
    if overwrite and processes.is_main_process:
        clear(folder)
    trainer = trainer_for(job, save=True)
    if last:
        display.say(f"goes on from {last}", "dim")
    try:
        trainer.train(resume_from_checkpoint=last)
    except KeyboardInterrupt:
        display.say(
            f"stopped at step {trainer.state.global_step}: --resume goes on from the last checkpoint, where one is"
        )
        raise
    for line in job.lost.lines():
        display.say(f"while training: {line}", "dim")
    show_best(trainer)
    save(job, folder / ADAPTER, trainer)
    if processes.is_main_process:
        display.say(peak(job, processes.device.type), "dim")
        draw(folder / LOSSES, folder / PICTURE)
    scores = judge(job, job.label)
    show_scores(job, None, scores)
    if processes.is_main_process:
        describe(job, folder / ADAPTER, None, scores)
        save_metrics(job, folder / ADAPTER, None, scores)


def join(recipe: Recipe) -> PartialState:
    """The processes that were started together; a ValueError where the recipe cannot be shared out among them."""
    launched = "LOCAL_RANK" in os.environ
    processes = PartialState(cpu=launched and not torch.cuda.is_available())  # else accelerate leaves each one alone
    if recipe.parallel == "fsdp" and processes.distributed_type == DistributedType.NO:
        raise ValueError(
            "parallel: fsdp shards the base over processes, and this is one alone: start it with torchrun"
            " --nproc-per-node N -m alora_kernels train recipe.yaml, or say parallel: ddp"
        )
    recipe.rows_at_once(processes.num_processes)
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
    last, skipped = (None, {}) if overwrite else newest_whole(place)  # which reads all that is there
    for name, why in skipped.items() if resume else ():
        display.say(f"{name} is passed over: {why}", "yellow")
    if resume and last:
        check_best(last)
    finished = (place / ADAPTER).is_dir() and any((place / ADAPTER).iterdir())
    begun = finished or last or skipped or any((place / name).exists() for name in (CONFLICTS, LOSSES))
    if resume and last is None:
        again = "with --overwrite, or into another --output" if begun else "without --resume"
        what = "whole checkpoint" if skipped else "checkpoint"
        raise ValueError(f"no {what} in {folder} to resume from: train {again}; save_steps in the recipe makes them")
    if resume or overwrite:
        return str(last) if resume else None
    if begun:
        what = f"a finished adapter, {folder / ADAPTER}" if finished else "a run that has begun"
        on = "--resume goes on from its last checkpoint, " if last else ""
        raise ValueError(f"{folder} holds {what}: {on}--overwrite replaces it, --output writes to another folder")
    return None


def clear(folder: Path) -> None:
    """Remove checkpoints and measurements of an earlier run; its adapter stays until the new one replaces it."""
    for old in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(old)
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    for name in (CONFLICTS, LOSSES, PICTURE):
        (folder / name).unlink(missing_ok=True)


def check_best(checkpoint: Path) -> None:
    """Raise a ValueError if the best model of a run that goes on is gone: the last one would be taken for it."""
    state = checkpoint / TRAINER_STATE_NAME
    best = json.loads(state.read_text(encoding="utf-8")).get("best_model_checkpoint") if state.is_file() else None
    if best and not Path(best).is_dir():
        raise ValueError(
            f"the best model so far was saved in {best}, which is not there: resume from the folder that the run began"
            " in, put the checkpoint back, or start anew with --overwrite"
        )


def trainer_for(run: Run, *, save: bool) -> ALoRATrainer:
    """The trainer a recipe describes, with a progress bar; with `save` it judges, saves and reports on its way."""
    recipe, processes = run.recipe, PartialState()
    sharded: Any = recipe.parallel == "fsdp"  # transformers' type is of its older spelling
    tasks = (run.train if recipe.streaming else run.learnt)["task"]
    when = schedule(recipe, tasks, validates=run.validation is not None)
    rows = recipe.rows_at_once(processes.num_processes)
    judged = run.validation is not None and save
    args = TrainingArguments(
        output_dir=recipe.output,
        run_name=Path(recipe.output).resolve().name,
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs or 1,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        optim=OPTIMIZERS.get(recipe.optimizer, recipe.optimizer),
        lr_scheduler_type=SCHEDULERS.get(recipe.scheduler, recipe.scheduler),
        warmup_steps=recipe.warmup_ratio or recipe.warmup_steps or 0,  # below 1 it is a share
        logging_steps=when.logging,
        eval_strategy="steps" if judged else "no",
        eval_steps=when.eval or None,
        save_strategy="steps" if save and when.save else "no",
        save_steps=when.save or 500,
        load_best_model_at_end=judged and when.keep_best,
        metric_for_best_model="mean_loss" if judged and when.keep_best else None,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # how often early stopping saw no improvement
        report_to=list(recipe.report_to) if save else "none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=processes.device.type == "cpu",
        fsdp=sharded,
        **recipe.model_dump(include=SAME),
    )
    trainer = ALoRATrainer(
        model=run.model,
        args=args,
        train_dataset=run.learnt,
        eval_dataset=run.validation if judged else None,
        processing_class=run.tokenizer,
        task_temperature=recipe.temperature,
        task_weights={} if recipe.streaming else recipe.weights,
        padding_free=None if recipe.packing == "auto" else recipe.packing,
        callbacks=[TrainingBar(), *([LossFile(Path(recipe.output) / LOSSES)] if save else [])],
    )
    if judged and recipe.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping))
    trainer.remove_callback(PrinterCallback)
    if save and recipe.conflict_steps:
        probes = probe_batches(run.test, trainer.data_collator, PROBE_ROWS)
        file = Path(recipe.output) / CONFLICTS
        trainer.add_callback(ConflictCallback(trainer.compute_loss, probes, file, every=recipe.conflict_steps))
    return trainer


def show_method(run: Run) -> None:
    """Print one line: the method, what it trains, and how its rank was chosen."""
    count = trainable_parameters(run.model)
    text = f"{run.label}: r={run.method.r}, {count / 1e6:.3g} M parameters train"
    if run.recipe.budget == "parameters":
        share = 100 * count / run.alora_parameters
        text += f", {share:.1f} % of the {run.alora_parameters / 1e6:.3g} M of ALoRA with r={run.recipe.r}"
    display.say(text)


def show_best(trainer: ALoRATrainer) -> None:
    """Print which model is kept, where some were judged while training."""
    state: Any = trainer.state
    if trainer.args.load_best_model_at_end:
        if state.best_model_checkpoint is None:
            raise ValueError("no evaluation gave a loss that is a number, so no model is the best: see losses.csv")
        display.say(f"kept: step {state.best_global_step}, validation loss {state.best_metric:.3f}, mean over tasks")


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
    (folder / METRICS).unlink(missing_ok=True)  # of an adapter that was here
    # elsewhere no task can be asked for by name, but a LoRA of one task by its folder's
    routed = run.method.name in ROUTED or (run.method.name == "lora" and len(run.tasks) == 1)
    words = {task: list(ids) for task, ids in run.choices.items()}
    cards = read_task_cards(run.recipe.adapter, run.tasks) if run.recipe.adapter else {}
    cards |= data.task_cards(run.recipe.tasks, run.text, words, run.recipe.chat_template) if routed else {}
    write_task_cards(folder, cards)
    (folder / "losses.json").write_text(json.dumps(trainer.state.log_history, indent=1))
