"""`ALoRATrainer`'s life: trained twice, resumed when finished, the best model restored."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from alora_kernels.training import ALoRATrainer
from alora_kernels.training.trainer import active_adapters
from alora_kernels.tuner import ALoRAConfig

from .test_trainer import CONFIG, TASKS, arguments, peft_model, rows, states


def test_a_second_call_of_train_goes_on_with_the_same_optimiser(tmp_path):
    """As stock Trainer: the optimiser and its moments stay; tasks that are absent stay put in the second run too."""
    trainer = ALoRATrainer(model=peft_model(), args=arguments(tmp_path, max_steps=3), train_dataset=rows(30))
    trainer.train()
    after_first = {k: v.clone() for k, v in states(trainer).items()}
    optimizer = trainer.optimizer
    trainer.train_dataset = rows(30).filter(lambda row: row["task"] != "zero")
    trainer.train()
    assert trainer.optimizer is optimizer
    moved = {
        task: any(not torch.equal(v[i], after_first[k][i]) for k, v in states(trainer).items() if "_A" in k)
        for i, task in enumerate(("copy", "next", "zero"))
    }
    assert moved == {"copy": True, "next": True, "zero": False}


def test_a_model_made_by_model_init_trains_anew_each_time(tmp_path):
    args = arguments(tmp_path, gradient_checkpointing=True)
    trainer = ALoRATrainer(model_init=lambda: named("default"), args=args, train_dataset=rows(30))
    found = []
    for _ in range(2):
        trainer.train()
        found.append({k: v.clone() for k, v in states(trainer).items()})
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
    assert any(entry.keys() >= {"loss_copy", "loss_next", "loss_zero"} for entry in trainer.state.log_history)


@pytest.mark.parametrize("steps", [7, 10])  # inside an epoch of five steps, and at its end
def test_resuming_a_finished_run_makes_no_step(tmp_path, steps):
    def trainer() -> ALoRATrainer:
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=steps)
        return ALoRATrainer(model=peft_model(), args=args, train_dataset=rows(30))

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    a, b = states(whole), states(again)
    assert all(torch.equal(a[name], b[name]) for name in a)


def named(name: str, tasks: list[str] = TASKS) -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG))
    return get_peft_model(base, config(tasks), adapter_name=name)


def config(tasks: list[str] = TASKS) -> ALoRAConfig:
    return ALoRAConfig(r=4, tasks=tasks, target_modules=["q_proj", "down_proj"], init_weights=False)


def native(name: str, tasks: list[str] = TASKS) -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG))
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
        LlamaForCausalLM(LlamaConfig(**CONFIG)), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine"
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_best_model_is_restored_whatever_its_adapter_is_called(tmp_path, kind):
    args = arguments(
        tmp_path, max_steps=4, learning_rate=0.5, optim="sgd", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="steps",
        greater_is_better=False,
    )  # fmt: skip
    model, seen = MODELS[kind](), WorseAndWorse()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    done = []
    trainer = ALoRATrainer(
        model=model, args=args, train_dataset=rows(30), eval_dataset=rows(6), callbacks=[seen],
        compute_metrics=lambda _: done.append(1) or {"steps": float(len(done))},
    )  # fmt: skip
    active = active_adapters(model)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    now = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert now.keys() == seen.best.keys()
    assert all(torch.equal(v, seen.best[k]) for k, v in now.items())
    assert active_adapters(model) == active
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("kind", MODELS)
def test_resume_goes_on_bit_for_bit_whatever_the_adapter_is_called(tmp_path, kind):
    def trainer(folder: str) -> ALoRATrainer:
        args = arguments(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=3)
        torch.manual_seed(0)
        return ALoRATrainer(model=MODELS[kind](), args=args, train_dataset=rows(30))

    whole, rest = trainer("a"), trainer("b")
    whole.train()
    with torch.no_grad():
        for name, p in rest.model.named_parameters():
            if "lora_" in name and p.requires_grad:
                p.zero_()
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    a, b = states(whole), states(rest)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert active_adapters(whole.model) == active_adapters(rest.model)


@pytest.mark.parametrize("make", [named, native], ids=["peft", "native"])
def test_a_checkpoint_of_other_tasks_is_refused_by_name(tmp_path, make):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    ALoRATrainer(model=make("mine", TASKS), args=args, train_dataset=rows(12)).train()
    for tasks, message in ((TASKS[::-1], "in another order"), (["copy", "next", "zeros"], "differ in their tasks")):
        data = rows(12).map(lambda row, last=tasks[-1]: {"task": last if row["task"] == "zero" else row["task"]})
        again = ALoRATrainer(model=make("mine", tasks), args=args, train_dataset=data)
        with pytest.raises(ValueError, match=message):
            again.train(resume_from_checkpoint=True)
    again = ALoRATrainer(model=make("other", TASKS), args=args, train_dataset=rows(12))
    if make is named:
        with pytest.raises(ValueError, match="no weights of the active adapter other"):
            again.train(resume_from_checkpoint=True)
