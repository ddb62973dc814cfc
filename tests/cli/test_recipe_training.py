"""What a recipe says of its training, end to end on a tiny random model: steps, evaluations, the best model, logs."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations import integration_utils

from alora_kernels import data
from alora_kernels.recipes import train as steps
from alora_kernels.recipes.job import LOGGED, load, schedule
from alora_kernels.recipes.recipe import load_recipe
from alora_kernels.training import ALoRATrainer
from tests.support.cli import alora, recipe, refused

JUDGED = {"validation_size": 8, "steps": 8, "eval_steps": 2, "save_steps": "null", "save_total_limit": "null"}
BEST = 4  # step


@pytest.fixture
def worse_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses that rise with the distance from one step."""
    judge = ALoRATrainer.evaluation_loop

    def judged(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = judge(self, *args, **kwargs)
        output.metrics["eval_mean_loss"] += 100 * abs(self.state.global_step - BEST)
        return output

    monkeypatch.setattr(ALoRATrainer, "evaluation_loop", judged)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run: Path) -> list[dict[str, str]]:
    with (run / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_settings_reach_the_trainer(tmp_path, jsonl):
    more = {"steps": "null", "epochs": 2, "batch_size": 8, "gradient_accumulation": 2, "scheduler": "constant",
            "warmup_ratio": 0.5, "optimizer": "adafactor", "max_grad_norm": 0.5, "weight_decay": 0.1, "seed": 3,
            "gradient_checkpointing": "true", "group_by_length": "true", "save_total_limit": 3, "save_steps": 7,
            "logging_steps": 5, "validation_size": 4, "early_stopping": 2}  # fmt: skip
    job = load(load_recipe(recipe(tmp_path, jsonl, **more)))
    trainer = steps.trainer_for(job, save=True)
    args, rows = trainer.args, len(job.train)
    total = schedule(job.recipe, job.train["task"], validates=True).total
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 2)
    assert (args.max_steps, args.num_train_epochs, total) == (-1, 2, 2 * -(-rows // 8))
    assert (args.lr_scheduler_type, args.get_warmup_steps(10)) == ("constant_with_warmup", 5)
    assert (args.optim, args.max_grad_norm, args.weight_decay, args.seed) == ("adafactor", 0.5, 0.1, 3)
    assert args.gradient_checkpointing and args.train_sampling_strategy == "group_by_length"
    assert (args.save_steps, args.eval_steps, args.save_total_limit, args.logging_steps) == (7, 7, 3, 5)
    assert args.load_best_model_at_end and args.metric_for_best_model == "mean_loss" and not args.greater_is_better
    assert any(type(each).__name__ == "EarlyStoppingCallback" for each in trainer.callback_handler.callbacks)


def test_how_often_a_run_logs_judges_and_saves(tmp_path, jsonl):
    def when(validates: bool, **more: Any) -> Any:
        return schedule(load_recipe(recipe(tmp_path, jsonl, **more)), ["a", "b"] * 60, validates=validates)

    long = {"steps": 1000, "save_steps": "null"}
    assert vars(when(False, **long)) == {"total": 1000, "logging": LOGGED, "eval": 0, "save": 100, "keep_best": False}
    assert vars(when(True, **long)) == {"total": 1000, "logging": LOGGED, "eval": 100, "save": 100, "keep_best": True}
    apart = {"eval_steps": 30, "save_steps": 20, "keep_best": "false"}
    assert vars(when(True, steps=60, **apart)) == {
        "total": 60,
        "logging": 5,
        "eval": 30,
        "save": 20,
        "keep_best": False,
    }
    epochs = {"steps": "null", "epochs": 1.5, "save_steps": 0}
    assert when(False, **epochs).total == 23 and when(False, **epochs, weights="{a: 3}").total == 45
    assert when(False, **epochs).save == 0 and when(False).logging == 1


def test_the_best_model_is_what_is_saved(tmp_path, jsonl, worse_after):
    """Bit for bit, of a run that was killed and resumed too, whose losses are then those of one run."""
    config = recipe(tmp_path, jsonl, **JUDGED)
    out, run = alora("train", config), tmp_path / "run"
    rows = losses(run)
    judged = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in judged if not row["task"]] == ["2", "4", "6", "8"]
    mean, *each = (float(row["loss"]) for row in judged if row["step"] == str(BEST))
    assert f"kept: step {BEST}, validation loss {mean:.3f}, mean over tasks" in out
    assert mean == pytest.approx(sum(each) / 2) and all(row["accuracy"] for row in judged)
    assert same(run / "adapter", run / f"checkpoint-{BEST}") and not same(run / "adapter", run / "checkpoint-8")
    trained = [row["step"] for row in rows if (row["split"], row["task"]) == ("train", "")]
    assert trained == [*map(str, range(1, 9))] and {row["task"] for row in rows} == {"", "even", "odd"}
    assert (run / "losses.png").stat().st_size > 1000

    shutil.copytree(run / "adapter", tmp_path / "first")
    written = (run / "losses.csv").read_text()
    for folder in (run / "adapter", run / "checkpoint-8"):
        shutil.rmtree(folder)
    (run / "losses.csv").write_text(written + "9,0.3,train,ev")  # a killed run's last line is cut
    alora("train", config, "--resume")
    assert same(run / "adapter", tmp_path / "first") and (run / "losses.csv").read_text() == written

    shutil.rmtree(run / f"checkpoint-{BEST}")
    assert "the best model so far was saved in" in refused("train", config, "--resume")


@pytest.mark.parametrize("method", ["lora", "hydralora"])
def test_other_methods_keep_their_best(tmp_path, jsonl, method, worse_after):
    alora("train", recipe(tmp_path, jsonl, **{**JUDGED, "steps": 6, "save_total_limit": 1}, method=method))
    (left,) = (tmp_path / "run").glob("checkpoint-*")
    assert left.name == f"checkpoint-{BEST}" and same(tmp_path / "run" / "adapter", left)


def test_a_run_that_no_longer_improves_ends(tmp_path, jsonl, worse_after):
    config = recipe(tmp_path, jsonl, **{**JUDGED, "steps": 40, "save_total_limit": 2}, early_stopping=2)
    assert f"kept: step {BEST}," in alora("train", config)
    run = tmp_path / "run"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    last = losses(run)[-1]
    assert last["step"] == "8"


def test_what_does_not_fit_the_data_is_said_before_the_model_is_loaded(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(data, "load_model", lambda *_, **__: pytest.fail("loaded first"))

    def said(**more: Any) -> str:
        return refused("train", recipe(tmp_path, jsonl, **more))

    wrong = said(weights="{evne: 2, odd: 1, nothing: 1}", early_stopping=1)
    assert "weights: no training rows of task 'evne'; did you mean even?" in wrong
    assert "weights: no training rows of task 'nothing'; known are even, odd" in wrong
    assert "early_stopping: no rows to judge while training: give validation_size" in wrong
    assert "eval_steps: a run of 4 steps ends before step 9: give at most 4" in said(
        eval_steps=9, validation_size=4, save_steps="null"
    )
    assert "save_steps: the best model is one of the checkpoints" in said(save_steps=0, validation_size=4)


def test_packages_that_are_missing_are_named_with_the_line_that_installs_them(
    tmp_path, jsonl, loads_nothing, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wrong = refused(
        "train", recipe(tmp_path, jsonl, report_to="[tensorboard, wandb]", optimizer="adamw_8bit", load_in="4bit")
    )
    assert "report_to: tensorboard needs tensorboard" in wrong and "optimizer needs bitsandbytes, load_in" in wrong
    assert "pip install bitsandbytes tensorboard wandb" in wrong


def test_what_was_true_of_training_does_not_hold_up_judging(tmp_path, jsonl):
    """Other rows, without validation rows among them, judge a run that stopped early."""
    config = recipe(tmp_path, jsonl, **JUDGED | {"steps": 2}, early_stopping=1, weights="{even: 2}")
    alora("train", config)
    saved = tmp_path / "run" / "adapter" / "recipe.yaml"
    saved.write_text(saved.read_text().replace("validation_size: 8", "validation_size: 0"))
    assert "even" in alora("eval", saved.parent)


def test_reporters_get_the_losses_of_every_task(tmp_path, jsonl, monkeypatch):
    """TensorBoard's own writer is another package: here it notes what it is given."""
    noted: set[str] = set()

    class Writer:
        def __init__(self, **options: Any) -> None:
            pass

        def add_scalar(self, tag: str, *value: Any) -> None:
            noted.add(tag)

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    fake = SimpleNamespace(SummaryWriter=Writer, __spec__=None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(steps, "check_packages", lambda needed: None)
    alora("train", recipe(tmp_path, jsonl, **JUDGED | {"steps": 2}, report_to="tensorboard"))
    assert {"train/loss", "train/loss_even", "train/loss_odd", "eval/loss_even", "eval/loss_odd"} <= noted


def test_scores_of_an_earlier_adapter_do_not_stay_beside_a_new_one(tmp_path, jsonl, monkeypatch):
    path, metrics = recipe(tmp_path, jsonl, steps=1), tmp_path / "run" / "adapter" / "metrics.json"
    alora("train", path)
    assert metrics.exists()

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ValueError("it ended while it judged")

    monkeypatch.setattr(steps, "judge", fails)
    assert "it ended while it judged" in refused("train", path, "--overwrite")
    assert not metrics.exists() and (metrics.parent / "adapter_config.json").exists()
