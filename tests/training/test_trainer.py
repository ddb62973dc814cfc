"""`ALoRATrainer` on a tiny random Llama: losses, logs, metrics, resume, errors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from alora_kernels import FusedALoRALinear, route
from alora_kernels.training import ALoRATrainer, answer_loss, choice_accuracy
from alora_kernels.tuner import ALoRAConfig

TASKS = ["copy", "next", "zero"]
CONFIG = dict(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip


def rows(count: int, seed: int = 0) -> Dataset:
    """Three tasks on the same inputs with different answers: only the task tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, list] = {"input_ids": [], "labels": [], "task": []}
    for i in range(count):
        length = int(torch.randint(2, 6, (), generator=generator))
        prompt = torch.randint(3, 30, (length,), generator=generator).tolist()
        task = TASKS[i % 3]
        answer = {"copy": prompt[-1], "next": prompt[-1] + 1, "zero": 1}[task]
        out["input_ids"].append([*prompt, answer])
        out["labels"].append([-100] * length + [answer])
        out["task"].append(task)
    return Dataset.from_dict(out)


def peft_model(routing: str = "task", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG))
    kind = {"tasks": TASKS} if routing == "task" else {"num_experts": 2}
    return get_peft_model(
        base,
        ALoRAConfig(
            r=4, lora_dropout=dropout, routing=routing, target_modules="all-linear", task_type="CAUSAL_LM", **kind
        ),
    )


def arguments(folder: Path, **changes) -> TrainingArguments:
    options = dict(
        output_dir=str(folder), per_device_train_batch_size=6, max_steps=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=1, use_cpu=True,
    )  # fmt: skip
    return TrainingArguments(**{**options, **changes})


@pytest.mark.parametrize("routing", ["task", "soft"])
def test_loss_is_the_models_own_and_each_task_is_logged(tmp_path, routing):
    data = rows(12)
    trainer = ALoRATrainer(model=peft_model(routing), args=arguments(tmp_path, max_steps=2), train_dataset=data)
    batch = trainer.data_collator([data[i] for i in range(6)])
    plain = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "labels")}
    with route(batch["task_ids"]):
        want = trainer.model(**plain).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), want)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all({f"loss_{task}" for task in TASKS} <= set(entry) for entry in logs)
    mean = sum(logs[-1][f"loss_{task}"] for task in TASKS) / 3  # two rows of each task in a batch
    assert logs[-1]["loss"] == pytest.approx(mean, rel=1e-3)


def test_it_learns_tasks_that_only_the_id_tells_apart(tmp_path):
    trainer = ALoRATrainer(
        model=peft_model(),
        args=arguments(tmp_path, max_steps=60, learning_rate=2e-2, logging_steps=20),
        train_dataset=rows(240),
        eval_dataset=rows(30, seed=5),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy_zero"] == 1.0
    assert {f"eval_loss_{task}" for task in TASKS} <= set(metrics)
    mean = sum(metrics[f"eval_accuracy_{task}"] for task in TASKS) / 3
    assert metrics["eval_accuracy"] == pytest.approx(mean)
    losses = answer_loss(trainer.model, list(rows(30, seed=5)), tasks=TASKS)
    assert losses == pytest.approx({task: metrics[f"eval_loss_{task}"] for task in losses}, rel=1e-5)
    assert set(losses) == set(TASKS)
    choices = {task: list(range(32)) for task in TASKS}
    by_choice = choice_accuracy(trainer.model, list(rows(30, seed=5)), choices, tasks=TASKS)
    for task in TASKS:  # all words compete, so choosing is the same as the evaluation's exact match
        assert by_choice[task] == pytest.approx(metrics[f"eval_accuracy_{task}"])


def states(trainer: ALoRATrainer) -> dict[str, torch.Tensor]:
    return {k: v for k, v in trainer.model.state_dict().items() if "lora_" in k}


@pytest.mark.parametrize("stop", [3, 6])  # inside the first epoch, inside the second
def test_resume_is_bit_identical(tmp_path, stop):
    options = dict(max_steps=8, save_strategy="steps", save_steps=stop, per_device_train_batch_size=6)
    whole = ALoRATrainer(
        model=peft_model(dropout=0.2), args=arguments(tmp_path / "a", **options), train_dataset=rows(30)
    )
    whole.train()
    fresh = ALoRATrainer(
        model=peft_model(dropout=0.2), args=arguments(tmp_path / "b", **options), train_dataset=rows(30)
    )
    fresh.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert fresh.state.global_step == 8
    a, b = states(whole), states(fresh)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "lion_32bit", "adamw_bnb_8bit"])
def test_absent_tasks_are_left_alone(tmp_path, optim):
    data = rows(30).filter(lambda row: row["task"] != "zero")
    for keep in (True, False):
        trainer = ALoRATrainer(
            model=peft_model(),
            args=arguments(tmp_path, weight_decay=0.1, optim=optim),
            train_dataset=data,
            keep_absent_tasks=keep,
        )
        before = copy.deepcopy(states(trainer))
        trainer.train()
        moved = {
            task: any(not torch.equal(v[i], before[k][i]) for k, v in states(trainer).items() if "_A" in k)
            for i, task in enumerate(TASKS)
        }
        assert moved == {"copy": True, "next": True, "zero": not keep}


def test_drop_in_layers_train_too(tmp_path):
    trainer = ALoRATrainer(
        model=drop_in_model(0.0), args=arguments(tmp_path), train_dataset=rows(30), eval_dataset=rows(9)
    )
    trainer.train()
    assert trainer.tasks == tuple(TASKS)
    assert "eval_accuracy_copy" in trainer.evaluate()


@pytest.mark.parametrize("kind", ["classifier", "tagger"])
def test_encoders_train_with_their_own_kind_of_loss(tmp_path, kind):
    """A classifier has one label per row; a tagger one per token, which no language model's shift may move."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    base = BertForSequenceClassification(config) if kind == "classifier" else BertForTokenClassification(config)
    model = get_peft_model(base, ALoRAConfig(r=2, tasks=TASKS, target_modules=["query", "value"]))
    data = rows(12)
    labels = [i % 3 for i in range(12)] if kind == "classifier" else [[0] * len(ids) for ids in data["input_ids"]]
    data = data.remove_columns("labels").add_column("labels", labels)
    trainer = ALoRATrainer(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    batch = trainer.data_collator([data[i] for i in range(6)])
    plain = {k: v for k, v in batch.items() if k not in ("task_ids", "logits_to_keep")}
    with route(batch["task_ids"]):
        want = trainer.model(**plain).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), want)
    trainer.train()
    assert "eval_accuracy_copy" in trainer.evaluate()


def test_gradient_accumulation_is_the_large_batch(tmp_path):
    results = []
    for size, accumulate in ((12, 1), (4, 3)):
        trainer = ALoRATrainer(
            model=peft_model(),
            args=arguments(
                tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
                optim="sgd",
            ),
            train_dataset=rows(24),
        )  # fmt: skip
        trainer.train()
        results.append(states(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], msg=name)


def drop_in_model(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj = FusedALoRALinear.from_linear(layer.mlp.down_proj, 4, tasks=TASKS, lora_dropout=dropout)
    return model


@pytest.mark.parametrize("make", [lambda: peft_model(dropout=0.1), lambda: drop_in_model(0.1)], ids=["peft", "drop-in"])
def test_gradient_checkpointing_changes_nothing(tmp_path, make):
    results = []
    for on in (False, True):
        trainer = ALoRATrainer(
            model=make(),
            args=arguments(tmp_path, gradient_checkpointing=on),
            train_dataset=rows(24),
        )
        trainer.train()
        results.append(states(trainer))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no `task` column"):
        ALoRATrainer(model=peft_model(), args=arguments(tmp_path), train_dataset=rows(6).remove_columns("task"))
    wrong = rows(6).map(lambda row: {"task": "copi" if row["task"] == "copy" else row["task"]})
    with pytest.raises(ValueError, match="unknown task 'copi': valid tasks are copy, next, zero"):
        ALoRATrainer(model=peft_model(), args=arguments(tmp_path), train_dataset=wrong)
    with pytest.raises(ValueError, match="no ALoRA layer"):
        ALoRATrainer(model=nn.Linear(2, 2), args=arguments(tmp_path), train_dataset=rows(6))
