"""Batches are routed by names: other active adapters, other orders of tasks, native adapters."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from alora_kernels import route
from alora_kernels.training import TaskCollator
from alora_kernels.training.tasks import batch_routing
from alora_kernels.tuner import ALoRAConfig
from tests.support.trainers import (
    TASKS,
    drop_in_model,
    known,
    llama,
    moved,
    own_loss,
    peft_model,
    rows,
    states,
    trainer_on,
)

SECOND = ["zero", "copy", "extra"]  # other places, one name more, one less


@pytest.fixture
def model() -> nn.Module:
    """Task "zero" is number 2 of the first adapter, which is active, and 0 of the second."""
    both = peft_model()
    config = ALoRAConfig(r=4, tasks=SECOND, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    both.add_adapter("second", config)
    return both


@pytest.mark.parametrize("train_first", [False, True])
def test_another_adapter_made_active_after_the_trainer_is_trained_by_name(tmp_path, model, train_first):
    """After a training of the first one, stock Trainer goes on with an optimiser that holds its parameters only."""
    trainer = trainer_on(tmp_path, known("zero"), model)
    if train_first:
        trainer.train()
    model.set_adapter("second")
    before = states(trainer)
    trainer.train()
    assert moved(before, trainer, "second") == {0}
    assert moved(before, trainer, "default") == set()


def test_names_that_the_first_adapter_does_not_have_train_after_the_change(tmp_path, model):
    trainer = trainer_on(tmp_path, known("zero"), model)
    model.set_adapter("second")
    trainer.train_dataset = known("zero").map(lambda row: {"task": "extra"})
    before = states(trainer)
    trainer.train()
    assert moved(before, trainer, "second") == {2}
    assert any("loss_extra" in entry for entry in trainer.state.log_history)
    trainer.train_dataset = known("next")  # the first adapter's, which is not active any more
    with pytest.raises(ValueError, match="no active adapter has the task next. Active are second: zero, copy, extra"):
        trainer.train()


def test_two_active_adapters_get_their_own_numbers(tmp_path, model):
    """The loss of each row is that of the row alone under its names; a row unknown to one adapter gets the other's."""
    model.base_model.set_adapter(["default", "second"])
    data = rows(12)
    trainer = trainer_on(tmp_path, data, model)
    batch = trainer.data_collator([data[i] for i in range(6)])
    got = trainer.compute_loss(model, dict(batch)).item()
    assert got == pytest.approx(own_loss(model, data.select(range(6))), rel=1e-5)
    with route(batch["task_ids"]), torch.no_grad():  # the first adapter's numbers for both
        wrong = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert got != pytest.approx(wrong.item(), rel=1e-3)


def test_a_collator_with_its_own_order_of_names(tmp_path):
    """The numbers in a batch are the collator's; the model is given the names."""
    trainer = trainer_on(tmp_path, known("copy"), data_collator=TaskCollator(0, list(reversed(TASKS))))
    before = states(trainer)
    trainer.train()
    assert moved(before, trainer, "default") == {TASKS.index("copy")}
    assert any("loss_copy" in entry for entry in trainer.state.log_history)


def test_an_adapter_that_transformers_added_itself(tmp_path):
    model = llama()
    model.add_adapter(ALoRAConfig(r=4, tasks=TASKS, target_modules=["q_proj", "down_proj"]), "mine")
    trainer = trainer_on(tmp_path, known("next"), model, eval_dataset=rows(9))
    before = states(trainer)
    trainer.train()
    assert moved(before, trainer, "mine") == {TASKS.index("next")}
    assert "eval_accuracy_next" in trainer.evaluate()


def test_numbers_that_mean_other_names_are_refused(tmp_path):
    names = ["zero", "next", "copy"]
    data = rows(12)
    numbered = data.remove_columns("task").add_column("task", [names.index(task) for task in data["task"]])
    meant = numbered.cast_column("task", ClassLabel(names=names))
    for bad in (meant, ConcatDataset([rows(3), Subset(meant, [0, 1])])):
        with pytest.raises(ValueError, match="mean zero, next, copy, but the model's tasks are copy, next, zero"):
            trainer_on(tmp_path, bad)
    trainer = trainer_on(tmp_path, numbered.cast_column("task", ClassLabel(names=TASKS)))
    with pytest.raises(ValueError, match="numbers in the `task` column of the evaluation dataset"):
        trainer.evaluate(meant)
    trainer.train()


def test_drop_in_layers_of_two_orders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give all layers the same tasks in the same order"):
        trainer_on(tmp_path, rows(6), drop_in_model(orders=(TASKS, TASKS[::-1])))


def test_packed_rows_are_routed_by_name_token_by_token(tmp_path, model):
    """With two tables the ids of tokens are looked up as those of rows are."""
    model.set_adapter("second")
    trainer = trainer_on(tmp_path, known("zero"), model, data_collator=TaskCollator(0, TASKS))
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
