"""The callback under transformers' Trainer and ours: rows, resume, and a training that does not notice."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from alora_kernels.analysis import ConflictCallback, probe_batches
from alora_kernels.analysis.gradients import COLUMNS
from alora_kernels.data import load_model
from alora_kernels.training import ALoRATrainer, TaskCollator
from alora_kernels.tuner import ALoRAConfig

from ..support.refusals import refused
from ..support.trainers import rows
from .test_gradients import TASKS, towards, toy_batches


def plain_collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a model knows, for transformers' Trainer."""
    batch = TaskCollator(0, TASKS)([{"task": 0, **feature} for feature in features])
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


def make_trainer(kind: str, folder: Path, **changes: Any) -> Trainer:
    base, _ = load_model("tiny-random")
    torch.manual_seed(0)
    options = dict(
        output_dir=str(folder), per_device_train_batch_size=6, max_steps=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=1, use_cpu=True,
    )  # fmt: skip
    args = TrainingArguments(**{**options, **changes})
    targets = ["q_proj", "v_proj"]
    if kind == "alora":
        config: Any = ALoRAConfig(r=2, lora_dropout=0.3, tasks=TASKS, target_modules=targets, task_type="CAUSAL_LM")
        return ALoRATrainer(model=get_peft_model(base, config), args=args, train_dataset=rows(18))
    config = LoraConfig(r=2, lora_dropout=0.3, target_modules=targets, task_type="CAUSAL_LM")
    return Trainer(model=get_peft_model(base, config), args=args, train_dataset=rows(18), data_collator=plain_collate)


def watched(trainer: Trainer, path: Path, every: int = 2) -> ConflictCallback:
    batches = probe_batches(rows(18), trainer.data_collator, 3)
    callback = ConflictCallback(trainer.compute_loss, batches, path, every=every)
    trainer.add_callback(callback)
    return callback


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["lora", "alora"])
def test_training_with_the_callback_gives_the_same_weights(tmp_path, kind):
    alone = make_trainer(kind, tmp_path / "alone")
    alone.train()
    trainer = make_trainer(kind, tmp_path / "watched")
    callback = watched(trainer, tmp_path / "new" / "conflicts.csv")
    trainer.train()
    want, got = alone.model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)
    keep = ("loss", "loss_copy", "loss_next", "loss_zero", "grad_norm")
    logs = [[{k: entry[k] for k in keep if k in entry} for entry in t.state.log_history] for t in (alone, trainer)]
    assert logs[0] == logs[1] and len(logs[0]) > 3
    found = read(tmp_path / "new" / "conflicts.csv")
    assert tuple(found[0]) == COLUMNS
    assert [row["step"] for row in found] == ["2"] * 8 + ["4"] * 8  # 2 layers x 2 modules x (A, B)
    sharing = {(row["parameter"], row["sharing"], row["pairs"]) for row in found}
    assert sharing == {("A", *(("per task", "0") if kind == "alora" else ("shared", "3"))), ("B", "shared", "3")}
    assert all(float(row["norm"]) > 0 for row in found)
    last = {(r.module, r.parameter): r for r in callback.latest}
    for row in found[8:]:
        record = last[row["module"], row["parameter"]]
        assert float(row["norm"]) == record.norm and int(row["conflicts"]) == record.conflicts


def test_rows_are_the_gradients_of_that_step(tmp_path):
    """The last rows, measured again by hand on the trained model."""
    trainer = make_trainer("lora", tmp_path)
    callback = watched(trainer, tmp_path / "c.csv", every=4)
    trainer.train()
    model = trainer.model.eval()
    by_task = {}
    for task, batch in callback.batches.items():
        model.zero_grad()
        model(**batch).loss.backward()
        by_task[task] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    record = next(r for r in callback.latest if r.parameter == "B")
    flat = torch.stack([g[f"{record.module}.lora_B.default.weight"].flatten().double() for g in by_task.values()])
    want = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(record.cosine, want, rtol=0, atol=1e-6)
    assert record.norms == pytest.approx(flat.norm(dim=1).tolist(), rel=1e-5)


class StopAt(TrainerCallback):
    """As if killed after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_resumed_run_has_the_rows_of_one_that_never_stopped(tmp_path):
    whole = make_trainer("lora", tmp_path / "whole")
    watched(whole, tmp_path / "whole.csv", every=1)
    whole.train()
    first = make_trainer("lora", tmp_path / "parts", save_strategy="steps", save_steps=2)
    watched(first, tmp_path / "parts.csv", every=1)
    first.add_callback(StopAt(3))  # step 3 is measured, and lost with the process
    first.train()
    with (tmp_path / "parts.csv").open("a") as file:
        file.write("1")  # of a row of step 10 and later, cut short
    second = make_trainer("lora", tmp_path / "parts", save_strategy="no")
    watched(second, tmp_path / "parts.csv", every=1)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_gradients_that_are_not_finite_are_named_and_do_not_end_the_training(tmp_path, caplog):
    trainer = make_trainer("lora", tmp_path)
    bad = probe_batches(rows(18), trainer.data_collator, 2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return trainer.compute_loss(model, batch) * float("nan")

    trainer.add_callback(ConflictCallback(loss, bad, tmp_path / "c.csv", every=4))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4 and read(tmp_path / "c.csv") == []
    (said,) = [r.getMessage() for r in caplog.records if "conflicts not measured" in r.getMessage()]
    assert "step 4" in said and "layers.0.self_attn.q_proj.lora_A.default.weight (copy)" in said and "more" in said


def test_the_callback_names_what_is_wrong(tmp_path):
    batches = toy_batches()
    refused("at least two, got up", ConflictCallback, towards, {"up": batches["up"]}, tmp_path / "c.csv")
    refused("every must be at least 1, got 0", ConflictCallback, towards, batches, tmp_path / "c.csv", every=0)
    (tmp_path / "old.csv").write_text("step\n1\n")
    trainer = make_trainer("lora", tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    callback = watched(trainer, tmp_path / "old.csv")
    refused("old.csv holds an earlier run's rows", trainer.train)
    assert (tmp_path / "old.csv").read_text() == "step\n1\n"
    trainer.remove_callback(callback)
    trainer.train()
    resumed = make_trainer("lora", tmp_path / "run", max_steps=2)
    watched(resumed, tmp_path / "old.csv")
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    columns = r"not a file of conflicts: its columns are \['step'\]"
    refused(columns, resumed.train, resume_from_checkpoint=checkpoint)


def test_probe_batches_are_the_first_rows_of_each_task():
    data = rows(18)
    got = probe_batches(data, lambda found: [row["input_ids"] for row in found], 2)
    assert list(got) == TASKS
    assert got["next"] == [data[1]["input_ids"], data[4]["input_ids"]]
    assert got == probe_batches([data[i] for i in range(len(data))], lambda found: [r["input_ids"] for r in found], 2)
    assert [len(b) for b in probe_batches(data, list, 100).values()] == [6, 6, 6]
    refused("column `task`", probe_batches, data.remove_columns("task"), list)
    refused("column `task`", probe_batches, [], list)
    refused("size must be at least 1", probe_batches, data, list, 0)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    args: Any = SimpleNamespace(world_size=2)
    callback = ConflictCallback(lambda model, batch: None, {"a": {}, "b": {}}, tmp_path / "c.csv")
    with pytest.raises(ValueError, match="conflicts are measured by one process alone, and these are 2"):
        callback.on_train_begin(args, None, None)
