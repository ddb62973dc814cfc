"""What `ALoRATrainer` gives of an evaluation: stock Trainer's results, loss and accuracy by task beside them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from alora_kernels.training import ALoRATrainer, TaskCollator
from tests.support import families, trainers
from tests.support.trainers import TASKS, arguments, logs_of, own_loss, peft_model, rows, texts, trainer_on


def stock(folder: Any, data: Dataset, **options: Any) -> Trainer:
    """transformers' own Trainer on the same batches, which a PEFT model routes by `adapter_names`."""
    model = peft_model()
    changes = options.pop("args", {})
    collator = TaskCollator(None, TASKS, model=model, ids_name="adapter_names")
    args = arguments(folder, per_device_eval_batch_size=4, remove_unused_columns=False, **changes)
    return Trainer(model=model, args=args, data_collator=collator, eval_dataset=data, **options)


def ours(folder: Any, data: Dataset, **options: Any) -> ALoRATrainer:
    args = arguments(folder, per_device_eval_batch_size=4, **options.pop("args", {}))
    return ALoRATrainer(model=peft_model(), args=args, eval_dataset=data, **options)


def same(got: dict[str, float], want: dict[str, float]) -> None:
    timed = ("runtime", "per_second", "preparation_time")
    for key, value in want.items():
        if not key.endswith(timed):
            assert got[key] == pytest.approx(value, rel=1e-5), key


def tokens_right(prediction: EvalPrediction) -> dict[str, float]:
    choices, labels = prediction.predictions, prediction.label_ids
    choices = choices if choices.ndim == 2 else choices.argmax(-1)
    asked = labels[:, 1:] != -100
    return {"tokens": float((choices[:, :-1] == labels[:, 1:])[asked].mean()), "rows": float(len(labels))}


def best(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def with_inputs(prediction: EvalPrediction) -> dict[str, float]:
    assert prediction.inputs is not None and prediction.losses is not None
    return {"inputs": float(prediction.inputs.sum()), "losses": float(prediction.losses.mean())}


class InBatches:
    """Metrics for `batch_eval_metrics`: asked batch by batch, the result at the end."""

    def __init__(self) -> None:
        self.right: list[float] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        choices, labels = prediction.predictions.argmax(-1), prediction.label_ids
        self.right += (choices[:, :-1] == labels[:, 1:])[labels[:, 1:] != -100].tolist()
        return {"tokens": float(np.mean(self.right))} if compute_result else {}


OPTIONS: dict[str, Any] = {
    "compute_metrics": lambda: {"compute_metrics": tokens_right},
    "preprocess_logits_for_metrics": lambda: {
        "compute_metrics": tokens_right, "preprocess_logits_for_metrics": best, "args": {"eval_accumulation_steps": 1}
    },
    "include_for_metrics": lambda: {
        "compute_metrics": with_inputs, "args": {"include_for_metrics": ["inputs", "loss"]}
    },
    "batch_eval_metrics": lambda: {"compute_metrics": InBatches(), "args": {"batch_eval_metrics": True}},
    "batch_eval_metrics without any": lambda: {"args": {"batch_eval_metrics": True}},
    "prediction_loss_only": lambda: {"compute_metrics": tokens_right, "args": {"prediction_loss_only": True}},
    "nothing": dict,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluate_gives_what_stock_trainer_gives_and_the_tasks(tmp_path, name):
    data = texts(10)
    want = stock(tmp_path, data, **OPTIONS[name]()).evaluate()
    got = ours(tmp_path, data, **OPTIONS[name]()).evaluate()
    same(got, want)
    assert {f"eval_{kind}_{task}" for kind in ("loss", "accuracy") for task in TASKS} <= set(got)


@pytest.mark.parametrize("labelled", [True, False])
def test_predict_gives_stock_trainers_logits(tmp_path, labelled):
    data = texts(10) if labelled else texts(10).remove_columns("labels")
    want = stock(tmp_path, data).predict(data)
    trainer = ours(tmp_path, data)
    got = trainer.predict(data)
    np.testing.assert_allclose(got.predictions, want.predictions, rtol=1e-4, atol=1e-5)
    assert (got.label_ids is None) == (not labelled)
    if labelled:
        np.testing.assert_array_equal(got.label_ids, want.label_ids)
        assert "test_accuracy_copy" in got.metrics
    same(got.metrics, want.metrics)
    row = data[9]
    with torch.no_grad():
        alone = trainer.model(input_ids=torch.tensor([row["input_ids"]]), adapter_names=[row["task"]]).logits[0]
    batch = trainer.data_collator([data[8], row])  # the last batch, padded to the longest of all rows afterwards
    place = batch["attention_mask"][1].nonzero().flatten()
    np.testing.assert_allclose(got.predictions[9][place], alone, rtol=1e-4, atol=1e-5)


def masked(data: Dataset, which: set[int]) -> Dataset:
    return data.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i in which else {}, with_indices=True)


def test_rows_without_a_label_are_left_out_and_counted_once(tmp_path):
    data = texts(10)
    partly = masked(data, {0, 4, 5, 6, 7})  # one whole batch of four too
    trainer = ours(tmp_path, partly)
    with pytest.warns(UserWarning, match="5 of 10 rows of the evaluation have no label that counts"):
        got = trainer.evaluate()
    kept = [1, 2, 3, 8, 9]
    want = ours(tmp_path, data.select(kept)).evaluate()
    for task in TASKS:
        for key in (f"eval_loss_{task}", f"eval_accuracy_{task}"):
            assert got.get(key) == pytest.approx(want[key], rel=1e-5) if key in want else key not in got
    assert got["eval_accuracy"] == pytest.approx(want["eval_accuracy"])
    per_batch = [own_loss(trainer.model, data.select([1, 2, 3])), own_loss(trainer.model, data.select([8, 9]))]
    assert got["eval_loss"] == pytest.approx((4 * per_batch[0] + 2 * per_batch[1]) / 6, rel=1e-5)  # stock's weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.evaluate()
    nothing = ours(tmp_path, masked(data, set(range(10))))
    with pytest.warns(UserWarning, match="10 of 10 rows"):
        metrics = nothing.evaluate()
    assert not any("accuracy" in key for key in metrics)
    assert not any(key.startswith("eval_loss_") for key in metrics)


def test_a_step_without_a_label_moves_nothing(tmp_path):
    data = masked(texts(6), {0, 1})
    changes = dict(per_device_train_batch_size=2, max_steps=3, train_sampling_strategy="sequential", optim="sgd")
    trainer = trainer_on(tmp_path, data, **changes)
    with pytest.warns(UserWarning, match="2 of 2 rows in the first steps of training have no label"):
        trainer.train()
    losses = [entry["loss"] for entry in logs_of(trainer)]
    assert losses[0] == 0.0
    assert losses[1] == pytest.approx(own_loss(peft_model(), data.select([2, 3])), rel=1e-4)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_the_best_model_can_be_chosen_by_a_tasks_metric(tmp_path):
    trainer = ours(
        tmp_path, rows(9), train_dataset=rows(12), args={
            "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
            "load_best_model_at_end": True, "metric_for_best_model": "loss_next",
        },
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is not None


class Generating(ALoRATrainer, Seq2SeqTrainer):
    """Beside transformers' trainer predictions are generated, each row with its task."""


def test_predictions_are_generated_as_for_the_rows_alone(tmp_path):
    model = families.build("T5", "seq2seq")
    examples = families.rows(model, "seq2seq")
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_max_length=8, report_to="none", use_cpu=True
    )
    trainer = Generating(model=model, args=args, processing_class=trainers.tokenizer())
    found = trainer.predict(Dataset.from_list(examples))
    for row, predicted in zip(examples, found.predictions.tolist(), strict=True):
        alone = model.generate(
            input_ids=torch.tensor([row["input_ids"]]), max_length=8, adapter_names=[row["task"]]
        )[0].tolist()  # fmt: skip
        assert predicted[: len(alone)] == alone
    loss = trainers.rows_alone(model, examples, "seq2seq")[1]
    torch.testing.assert_close(found.metrics["test_loss"], loss, rtol=1e-4, atol=1e-5)
