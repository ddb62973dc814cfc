"""`ALoRATrainer` on a tiny random Llama: losses, logs, metrics, resume, errors."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from alora_kernels import route
from alora_kernels.training import answer_loss, choice_accuracy
from tests.support import families
from tests.support.trainers import (
    TASKS,
    assert_equal,
    drop_in_model,
    logs_of,
    moved,
    peft_model,
    rows,
    states,
    trainer_on,
)


def check_loss(trainer) -> None:
    """The loss of a batch is the model's own."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    plain = {k: v for k, v in batch.items() if k != "task_ids"}
    with route(batch["task_ids"]):
        want = trainer.model(**plain).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), want)


@pytest.mark.parametrize("routing", ["task", "soft"])
def test_loss_is_the_models_own_and_each_task_is_logged(tmp_path, routing):
    trainer = trainer_on(tmp_path, rows(12), peft_model(routing), max_steps=2)
    check_loss(trainer)
    trainer.train()
    logs = logs_of(trainer)
    assert all({f"loss_{task}" for task in TASKS} <= set(entry) for entry in logs)
    mean = sum(logs[-1][f"loss_{task}"] for task in TASKS) / 3  # two rows of each task in a batch
    assert logs[-1]["loss"] == pytest.approx(mean, rel=1e-3)


def test_it_learns_tasks_that_only_the_id_tells_apart(tmp_path):
    test = rows(30, seed=5)
    changes = dict(max_steps=60, learning_rate=2e-2, logging_steps=20, eval_dataset=test)
    trainer = trainer_on(tmp_path, rows(240), **changes)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy_zero"] == 1.0
    assert {f"eval_loss_{task}" for task in TASKS} <= set(metrics)
    mean = sum(metrics[f"eval_accuracy_{task}"] for task in TASKS) / 3
    assert metrics["eval_accuracy"] == pytest.approx(mean)
    losses = answer_loss(trainer.model, list(test), tasks=TASKS)
    assert losses == pytest.approx({task: metrics[f"eval_loss_{task}"] for task in losses}, rel=1e-5)
    assert set(losses) == set(TASKS)
    by_choice = choice_accuracy(trainer.model, list(test), {task: list(range(32)) for task in TASKS}, tasks=TASKS)
    for task in TASKS:  # all words compete, so choosing is the same as the evaluation's exact match
        assert by_choice[task] == pytest.approx(metrics[f"eval_accuracy_{task}"])


@pytest.mark.parametrize("stop", [3, 6])  # inside the first epoch, inside the second
def test_resume_is_bit_identical(tmp_path, stop):
    whole, fresh = (
        trainer_on(
            tmp_path / folder, rows(30), peft_model(dropout=0.2), max_steps=8, save_strategy="steps", save_steps=stop
        )
        for folder in ("a", "b")
    )
    whole.train()
    fresh.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert fresh.state.global_step == 8
    assert_equal(states(whole), states(fresh))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "lion_32bit", "adamw_bnb_8bit"])
def test_absent_tasks_are_left_alone(tmp_path, optim):
    data = rows(30).filter(lambda row: row["task"] != "zero")
    for keep in (True, False):
        trainer = trainer_on(tmp_path, data, weight_decay=0.1, optim=optim, keep_absent_tasks=keep)
        before = states(trainer)
        trainer.train()
        assert moved(before, trainer) == ({0, 1} if keep else {0, 1, 2})


def test_drop_in_layers_train_too(tmp_path):
    trainer = trainer_on(tmp_path, rows(30), drop_in_model(), eval_dataset=rows(9))
    trainer.train()
    assert trainer.tasks == tuple(TASKS)
    assert "eval_accuracy_copy" in trainer.evaluate()


@pytest.mark.parametrize("head", ["row", "token"])
def test_encoders_train_with_their_own_kind_of_loss(tmp_path, head):
    """A classifier has one label per row; a tagger one per token, which no language model's shift may move."""
    model = families.build("Bert", head)
    data = Dataset.from_list(families.rows(model, head) * 3)
    trainer = trainer_on(tmp_path, data, model, eval_dataset=data)
    check_loss(trainer)
    trainer.train()
    assert "eval_accuracy_a" in trainer.evaluate()


@pytest.mark.parametrize("make", [lambda: peft_model(dropout=0.1), lambda: drop_in_model(0.1)], ids=["peft", "drop-in"])
def test_gradient_checkpointing_changes_nothing(tmp_path, make):
    results = []
    for on in (False, True):
        trainer = trainer_on(tmp_path, rows(24), make(), gradient_checkpointing=on, padding_free=False)
        trainer.train()
        results.append(states(trainer))
    assert_equal(*results)
