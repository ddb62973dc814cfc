"""What the tests of the trainer share: rows that only the task tells apart, arguments, one step and its gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from alora_kernels import FusedALoRALinear, route
from alora_kernels.training import ALoRATrainer
from alora_kernels.tuner import ALoRAConfig

from . import families

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


def texts(count: int, seed: int = 0) -> Dataset:
    """Rows of many labels, more than a batch has rows: every token after the first, or after a prompt of three."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, list] = {"input_ids": [], "labels": [], "task": []}
    for i in range(count):
        ids = torch.randint(3, 30, (int(torch.randint(7, 12, (), generator=generator)),), generator=generator).tolist()
        out["input_ids"].append(ids)
        out["labels"].append([-100] * (1 + 2 * (i % 2)) + ids[1 + 2 * (i % 2) :])
        out["task"].append(TASKS[i % 3])
    return Dataset.from_dict(out)


def known(*tasks: str) -> Dataset:
    """Rows of these tasks alone."""
    return rows(24).filter(lambda row: row["task"] in tasks)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def peft_model(routing: str = "task", dropout: float = 0.0) -> nn.Module:
    kind = {"tasks": TASKS} if routing == "task" else {"num_experts": 2}
    settings = dict(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(llama(), ALoRAConfig(routing=routing, **settings, **kind))


def drop_in_model(dropout: float = 0.0, orders: tuple[list[str], ...] = (TASKS, TASKS)) -> nn.Module:
    model = llama().requires_grad_(False)
    for layer, tasks in zip(model.model.layers, orders, strict=True):
        layer.mlp.down_proj = FusedALoRALinear.from_linear(layer.mlp.down_proj, 4, tasks=tasks, lora_dropout=dropout)
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = dict(
        output_dir=str(folder), per_device_train_batch_size=6, max_steps=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=1, use_cpu=True,
    )  # fmt: skip
    return TrainingArguments(**{**options, **changes})


OWN = (
    "eval_dataset", "data_collator", "callbacks", "compute_metrics", "task_temperature", "task_weights",
    "keep_absent_tasks", "padding_free",
)  # fmt: skip


def trainer_on(folder: Path, data: Any, model: nn.Module | None = None, **changes: Any) -> ALoRATrainer:
    """A trainer of `peft_model()`; changes are the trainer's own arguments, or those of `TrainingArguments`."""
    own = {name: changes.pop(name) for name in OWN if name in changes}
    args = arguments(folder, **changes)
    return ALoRATrainer(model=peft_model() if model is None else model, args=args, train_dataset=data, **own)


def logs_of(trainer: Any) -> list[dict[str, float]]:
    """What was logged of steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def states(trainer: ALoRATrainer) -> dict[str, torch.Tensor]:
    """A copy of the adapters' tensors."""
    return {k: v.clone() for k, v in trainer.model.state_dict().items() if "lora_" in k}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same bits under the same names."""
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def moved(before: dict[str, torch.Tensor], trainer: ALoRATrainer, adapter: str = "") -> set[int]:
    """Which tasks' A, of all adapters or of one, are other than before."""
    after = states(trainer)
    names = [name for name in before if "lora_A" in name and (not adapter or adapter in name.split("."))]
    assert names
    return {i for name in names for i in range(len(before[name])) if not torch.equal(before[name][i], after[name][i])}


def own_loss(model: nn.Module, data: Dataset) -> float:
    """The model's own loss per label, row by row, alone and unpadded."""
    total = count = 0.0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels, adapter_names=[row["task"]]).loss
        total, count = total + float(loss * (labels != -100).sum()), count + int((labels != -100).sum())
    return total / count


# ---- one step of plain SGD on a model of `families`, against its rows alone


def sgd(folder: Path, **changes: Any) -> TrainingArguments:
    """One step at a rate of 1, which moves every parameter by its gradient."""
    options = dict(
        per_device_train_batch_size=8, max_steps=1, learning_rate=1.0, optim="sgd", max_grad_norm=0.0, weight_decay=0.0,
        seed=42,
    )  # fmt: skip
    return arguments(folder, **{**options, **changes})


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(
    model: nn.Module, data: Any, folder: Path, collator: Any = None, kind: type = ALoRATrainer, **changes: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What one optimiser step moved, its gradient, and the log."""
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    dataset = Dataset.from_list(data) if isinstance(data, list) else data
    trainer = kind(model=model, args=sgd(folder, **changes), train_dataset=dataset, data_collator=collator)
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trained(model).items()}, logs_of(trainer)[0]


def rows_alone(model: nn.Module, examples: list, head: str) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and value of the model's own loss, rows one at a time, weighted by their labels."""
    total, labels = torch.zeros(()), 0
    model.zero_grad()
    for row in examples:
        count = 1 if head == "row" else len(row["labels"]) - (head == "lm")
        with route(torch.tensor([families.TASKS.index(row["task"])])):
            total = total + model(**families.alone(row)).loss * count
        labels += count
    (total / labels).backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained(model).items()}
    return grads, float(total.detach() / labels)


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rtol: float = 1e-3, atol: float = 1e-5):
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=rtol, atol=atol, msg=name)


def assert_step(
    got: tuple[dict[str, torch.Tensor], dict[str, float]], want: tuple[dict[str, torch.Tensor], float]
) -> None:
    """A step of `step` is that of `rows_alone`."""
    assert got[1]["loss"] == pytest.approx(want[1], rel=1e-4)
    assert_close(got[0], want[0])


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w9"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", mask_token="w3", padding_side=side)


def two_processes(process: Callable[[int, Callable[[int], int]], None]) -> None:
    """Run `process(rank, agree)` as two threads; `agree` gives both the larger of their verdicts, as a gather does."""
    barrier, verdicts = threading.Barrier(2, timeout=60), [0, 0]

    def run(rank: int) -> None:
        def agree(verdict: int) -> int:
            verdicts[rank] = verdict
            barrier.wait()
            largest = max(verdicts)
            barrier.wait()
            return largest

        process(rank, agree)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
