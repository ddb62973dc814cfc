"""`ALoRATrainer`'s life: trained twice, resumed when finished, the best model restored."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from alora_kernels.tensor_file import DamagedFileError
from alora_kernels.training import ALoRATrainer
from alora_kernels.training.trainer import active_adapters
from alora_kernels.tuner import ALoRAConfig
from tests.support.trainers import (
    TASKS,
    arguments,
    assert_equal,
    known,
    llama,
    logs_of,
    moved,
    rows,
    states,
    trainer_on,
)


def test_a_second_call_of_train_goes_on_with_the_same_optimiser(tmp_path):
    """As stock Trainer: the optimiser and its moments stay; tasks that are absent stay put in the second run too."""
    trainer = trainer_on(tmp_path, rows(30), max_steps=3)
    trainer.train()
    after_first, optimizer = states(trainer), trainer.optimizer
    trainer.train_dataset = known("copy", "next")
    trainer.train()
    assert trainer.optimizer is optimizer
    assert moved(after_first, trainer) == {0, 1}


def test_a_model_made_by_model_init_trains_anew_each_time(tmp_path):
    args = arguments(tmp_path, gradient_checkpointing=True)
    trainer = ALoRATrainer(model_init=lambda: named("default"), args=args, train_dataset=rows(30))
    found = []
    for _ in range(2):
        trainer.train()
        found.append(states(trainer))
    assert_equal(*found)
    assert any(entry.keys() >= {"loss_copy", "loss_next", "loss_zero"} for entry in logs_of(trainer))


@pytest.mark.parametrize("steps", [7, 10])  # inside an epoch of five steps, and at its end
def test_resuming_a_finished_run_makes_no_step(tmp_path, steps):
    whole, again = (
        trainer_on(tmp_path, rows(30), max_steps=steps, save_strategy="steps", save_steps=steps) for _ in range(2)
    )
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert_equal(states(whole), states(again))


def named(name: str, tasks: list[str] = TASKS) -> nn.Module:
    return get_peft_model(llama(), config(tasks), adapter_name=name)


def config(tasks: list[str] = TASKS) -> ALoRAConfig:
    return ALoRAConfig(r=4, tasks=tasks, target_modules=["q_proj", "down_proj"], init_weights=False)


def native(name: str, tasks: list[str] = TASKS) -> nn.Module:
    base = llama()
    base.add_adapter(config(tasks), name)
    return base


def second_active() -> nn.Module:
    model = named("default")
    model.add_adapter("second", config())
    model.set_adapter("second")
    return model


def both_active() -> nn.Module:
    model = second_active()
    model.base_model.set_adapter(["second", "default"])
    return model


class WorseAndWorse(TrainerCallback):
    """Keeps the adapter of the first evaluation, the best one; the steps after it move the model away from it."""

    def __init__(self) -> None:
        self.best: dict[str, torch.Tensor] = {}

    def on_save(self, args, state, control, model, **kwargs):
        if not self.best:
            self.best = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}


MODELS = {
    "default": lambda: named("default"),
    "another name": lambda: named("mine"),
    "second of two": second_active,
    "two active": both_active,
    "native": lambda: native("mine"),
    "native default": lambda: native("default"),
    "stock LoRA of another name": lambda: get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine"
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_best_model_is_restored_whatever_its_adapter_is_called(tmp_path, kind):
    model, seen, done = MODELS[kind](), WorseAndWorse(), []
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_on(
        tmp_path, rows(30), model, learning_rate=0.5, optim="sgd", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="steps",
        greater_is_better=False, eval_dataset=rows(6), callbacks=[seen],
        compute_metrics=lambda _: done.append(1) or {"steps": float(len(done))},
    )  # fmt: skip
    active = active_adapters(model)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert_equal(states(trainer), seen.best)
    assert active_adapters(model) == active
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("kind", MODELS)
def test_resume_goes_on_bit_for_bit_whatever_the_adapter_is_called(tmp_path, kind):
    whole, rest = (
        trainer_on(tmp_path / folder, rows(30), MODELS[kind](), max_steps=6, save_strategy="steps", save_steps=3)
        for folder in ("a", "b")
    )
    whole.train()
    with torch.no_grad():
        for name, p in rest.model.named_parameters():
            if "lora_" in name and p.requires_grad:
                p.zero_()
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_equal(states(whole), states(rest))
    assert active_adapters(whole.model) == active_adapters(rest.model)


@pytest.mark.parametrize("make", [named, native], ids=["peft", "native"])
def test_a_checkpoint_of_other_tasks_is_refused_by_name(tmp_path, make):
    def trainer(name: str, tasks: list[str]) -> ALoRATrainer:
        data = rows(12).map(lambda row: {"task": tasks[-1] if row["task"] == "zero" else row["task"]})
        return trainer_on(tmp_path, data, make(name, tasks), max_steps=2, save_strategy="steps", save_steps=2)

    trainer("mine", TASKS).train()
    for tasks, message in ((TASKS[::-1], "in another order"), (["copy", "next", "zeros"], "differ in their tasks")):
        with pytest.raises(ValueError, match=message):
            trainer("mine", tasks).train(resume_from_checkpoint=True)
    if make is named:
        with pytest.raises(ValueError, match="no weights of the active adapter other"):
            trainer("other", TASKS).train(resume_from_checkpoint=True)


def test_a_checkpoint_with_a_changed_bit_is_refused(tmp_path):
    trainer = trainer_on(tmp_path, rows(12), named("mine"), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    weights = tmp_path / "checkpoint-2" / "mine" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedFileError, match="does not have the SHA-256 it was written with"):
        trainer.train(resume_from_checkpoint=True)
