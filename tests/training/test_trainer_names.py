"""Batches are routed by names: other active adapters, other orders of tasks, native adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import ClassLabel, Dataset
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from transformers import LlamaConfig, LlamaForCausalLM

from alora_kernels import FusedALoRALinear, route
from alora_kernels.training import ALoRATrainer, TaskCollator
from alora_kernels.training.tasks import batch_routing
from alora_kernels.tuner import ALoRAConfig

from .test_trainer import CONFIG, TASKS, arguments, peft_model, rows

SECOND = ["zero", "copy", "extra"]  # other places, one name more, one less


def second_adapter(model: nn.Module) -> None:
    config = ALoRAConfig(r=4, tasks=SECOND, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("second", config)


def known(*tasks: str) -> Dataset:
    return rows(24).filter(lambda row: row["task"] in tasks)


def moved(before: dict[str, torch.Tensor], model: nn.Module, adapter: str) -> set[int]:
    """Which rows of the adapter's stacked A are other than before."""
    after = model.state_dict()
    names = [name for name in before if "lora_A" in name and adapter in name.split(".")]
    assert names
    return {i for name in names for i in range(len(before[name])) if not torch.equal(before[name][i], after[name][i])}


def test_another_adapter_made_active_after_the_trainer_is_trained_by_name(tmp_path):
    """Task "zero" is number 2 of the first adapter and 0 of the second."""
    model = peft_model()
    second_adapter(model)
    trainer = ALoRATrainer(model=model, args=arguments(tmp_path), train_dataset=known("zero"))
    model.set_adapter("second")
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert moved(before, model, "second") == {0}
    assert moved(before, model, "default") == set()


def test_the_second_adapter_trains_after_the_first_was_trained(tmp_path):
    """Stock Trainer goes on with an optimiser that holds the first one's parameters only."""
    model = peft_model()
    second_adapter(model)
    trainer = ALoRATrainer(model=model, args=arguments(tmp_path), train_dataset=known("zero"))
    trainer.train()
    model.set_adapter("second")
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert moved(before, model, "second") == {0}
    assert moved(before, model, "default") == set()


def test_names_that_the_first_adapter_does_not_have_train_after_the_change(tmp_path):
    model = peft_model()
    second_adapter(model)
    trainer = ALoRATrainer(model=model, args=arguments(tmp_path), train_dataset=known("zero"))
    model.set_adapter("second")
    extra = known("zero").remove_columns("task").add_column("task", ["extra"] * len(known("zero")))
    trainer.train_dataset = extra
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert moved(before, model, "second") == {2}
    assert any("loss_extra" in entry for entry in trainer.state.log_history)
    trainer.train_dataset = known("next")  # the first adapter's, which is not active any more
    with pytest.raises(ValueError, match="no active adapter has the task next. Active are second: zero, copy, extra"):
        trainer.train()


def test_two_active_adapters_get_their_own_numbers(tmp_path):
    """The loss of each row is that of the row alone under its names; a row unknown to one adapter gets the other's."""
    model = peft_model()
    second_adapter(model)
    model.base_model.set_adapter(["default", "second"])
    data = rows(12)
    trainer = ALoRATrainer(model=model, args=arguments(tmp_path), train_dataset=data)
    batch = trainer.data_collator([data[i] for i in range(6)])
    got = trainer.compute_loss(model, dict(batch)).item()
    total = labels = 0
    for row in (data[i] for i in range(6)):
        ids, targets = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            out = model(input_ids=ids, labels=targets, adapter_names=[row["task"]])
        total += out.loss.item() * int((targets != -100).sum())
        labels += int((targets != -100).sum())
    assert got == pytest.approx(total / labels, rel=1e-5)
    with route(batch["task_ids"]), torch.no_grad():  # the first adapter's numbers for both
        wrong = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert got != pytest.approx(wrong.item(), rel=1e-3)


def test_a_collator_with_its_own_order_of_names(tmp_path):
    """The numbers in a batch are the collator's; the model is given the names."""
    model = peft_model()
    collator = TaskCollator(0, list(reversed(TASKS)))
    trainer = ALoRATrainer(model=model, args=arguments(tmp_path), train_dataset=known("copy"), data_collator=collator)
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert moved(before, model, "default") == {TASKS.index("copy")}
    assert any("loss_copy" in entry for entry in trainer.state.log_history)


def test_an_adapter_that_transformers_added_itself(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.add_adapter(ALoRAConfig(r=4, tasks=TASKS, target_modules=["q_proj", "down_proj"]), "mine")
    trainer = ALoRATrainer(model=model, args=arguments(tmp_path), train_dataset=known("next"), eval_dataset=rows(9))
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert moved(before, model, "mine") == {TASKS.index("next")}
    assert "eval_accuracy_next" in trainer.evaluate()


def test_numbers_that_mean_other_names_are_refused(tmp_path):
    names = ["zero", "next", "copy"]
    data = rows(12)
    numbered = data.remove_columns("task").add_column("task", [names.index(task) for task in data["task"]])
    meant = numbered.cast_column("task", ClassLabel(names=names))
    with pytest.raises(ValueError, match="mean zero, next, copy, but the model's tasks are copy, next, zero"):
        ALoRATrainer(model=peft_model(), args=arguments(tmp_path), train_dataset=meant)
    joined = ConcatDataset([rows(3), Subset(meant, [0, 1])])
    with pytest.raises(ValueError, match="mean zero, next, copy, but the model's tasks are copy, next, zero"):
        ALoRATrainer(model=peft_model(), args=arguments(tmp_path), train_dataset=joined)
    same = numbered.cast_column("task", ClassLabel(names=TASKS))
    trainer = ALoRATrainer(model=peft_model(), args=arguments(tmp_path), train_dataset=same)
    with pytest.raises(ValueError, match="numbers in the `task` column of the evaluation dataset"):
        trainer.evaluate(meant)
    trainer.train()


def test_drop_in_layers_of_two_orders_are_refused(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).requires_grad_(False)
    for layer, tasks in zip(model.model.layers, (TASKS, TASKS[::-1]), strict=True):
        layer.mlp.down_proj = FusedALoRALinear.from_linear(layer.mlp.down_proj, 4, tasks=tasks)
    with pytest.raises(ValueError, match="give all layers the same tasks in the same order"):
        ALoRATrainer(model=model, args=arguments(tmp_path), train_dataset=rows(6))


def test_packed_rows_are_routed_by_name_token_by_token(tmp_path):
    """With two tables the ids of tokens are looked up as those of rows are."""
    model = peft_model()
    second_adapter(model)
    model.set_adapter("second")
    trainer = ALoRATrainer(
        model=model, args=arguments(tmp_path), train_dataset=known("zero"), data_collator=TaskCollator(0, TASKS)
    )
    tokens = torch.randint(3, 30, (1, 6))
    with torch.no_grad(), trainer._routing(torch.tensor([[2, 2, 2, 2, 2, 2]])):
        got = model(input_ids=tokens).logits
    with torch.no_grad():
        want = model(input_ids=tokens, adapter_names=["zero"]).logits
    torch.testing.assert_close(got, want)


def test_rows_that_share_an_id_do_so_for_every_adapter():
    tables = {"first": ("a", "b"), "second": ("b", "c")}
    routing = batch_routing(torch.tensor([1, 2]), ("a", "b", "c"), tables).repeated(2)
    for tasks, ids in ((tables["first"], [1, 1, -1, -1]), (tables["second"], [0, 0, 1, 1])):
        groups = routing.for_tasks(tasks).groups(torch.Size([4]), 2, torch.device("cpu"))
        assert groups.ids.tolist() == ids
