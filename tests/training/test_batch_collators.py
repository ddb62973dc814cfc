"""Stock collators beside a `task` column, our collator under stock tools, and streams."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
from datasets import Dataset, IterableDataset

from alora_kernels import route
from alora_kernels.training import ALoRATrainer, TaskCollator
from alora_kernels.training.collator import WithTasks
from tests.support.families import TASKS, alone, build, rows
from tests.support.trainers import assert_close, assert_step, rows_alone, sgd, step, tokenizer

HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
WHOLE = {"per_device_train_batch_size": 4}


def check_step(model, examples, head, folder, collator) -> None:
    """One step with the collator has the gradient of the rows alone."""
    want = rows_alone(model, examples, head)
    dataset = Dataset.from_list(examples)
    if isinstance(collator, tf.DataCollatorForLanguageModeling):
        dataset = dataset.remove_columns("labels")  # it makes them of input_ids
    assert_step(step(model, dataset, folder, collator, **HALVES), want)


@pytest.mark.parametrize(("family", "head", "collator"), [
    ("T5", "seq2seq", lambda model: tf.DataCollatorForSeq2Seq(tokenizer())),
    ("T5", "seq2seq", lambda model: tf.DataCollatorForSeq2Seq(tokenizer(), model=model.get_base_model())),
    ("Bart", "seq2seq", lambda model: tf.DataCollatorForSeq2Seq(tokenizer())),
    ("Bert", "row", lambda model: tf.DataCollatorWithPadding(tokenizer())),
    ("Bert", "token", lambda model: tf.DataCollatorForTokenClassification(tokenizer())),
    ("Llama", "token", lambda model: tf.DataCollatorForTokenClassification(tokenizer("left"))),
    ("GPT2", "token", lambda model: tf.DataCollatorForTokenClassification(tokenizer("left"))),
    ("GPT2", "row", lambda model: tf.DataCollatorWithPadding(tokenizer("left"))),
    ("Llama", "lm", lambda model: tf.DataCollatorForLanguageModeling(tokenizer("left"), mlm=False)),
    ("GPT2", "lm", lambda model: tf.DataCollatorForLanguageModeling(tokenizer("left"), mlm=False)),
    ("GPT2", "lm", lambda model: tf.DataCollatorForLanguageModeling(tokenizer(), mlm=False)),
    ("Llama", "lm", lambda model: tf.DataCollatorForSeq2Seq(tokenizer("left"))),
], ids=[
    "T5-seq2seq", "T5-seq2seq-model", "Bart-seq2seq", "Bert-padding", "Bert-tagger", "Llama-tagger-left",
    "GPT2-tagger-left", "GPT2-row-left",
    "Llama-lm-left", "GPT2-lm-left", "GPT2-lm-right", "Llama-seq2seq-left",
])  # fmt: skip
def test_stock_collators_train_as_the_rows_alone(tmp_path, family, head, collator):
    model = build(family, head)
    examples = rows(model, head)
    check_step(model, examples, head, tmp_path, collator(model))


@pytest.mark.parametrize(("family", "head"), [("Bert", "row"), ("Bart", "seq2seq"), ("RecurrentGemma", "lm")])
def test_padding_that_a_model_cannot_bear_is_warned_of(tmp_path, family, head):
    model = build(family, head)
    for side, warned in (("left", 1), ("right", 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ALoRATrainer(
                model=model, args=sgd(tmp_path), data_collator=tf.DataCollatorWithPadding(tokenizer(side)),
                train_dataset=Dataset.from_list(rows(model, head)),
            )  # fmt: skip
        assert sum("set tokenizer.padding_side = 'right'" in str(w.message) for w in caught) == warned


def test_rows_joined_to_one_keep_their_tasks(tmp_path):
    for family in ("Llama", "GPT2"):
        model = build(family, "lm")
        check_step(model, rows(model, "lm"), "lm", tmp_path, tf.DataCollatorWithFlattening())
        batch = WithTasks(tf.DataCollatorWithFlattening(), TASKS)(rows(model, "lm"))
        assert batch["task_ids"].tolist() == [[0] * 9 + [1] * 3 + [0] * 6 + [1] * 2]


def test_the_default_collator_takes_rows_of_one_length(tmp_path):
    model = build("Bert", "row")
    examples = [{"input_ids": [5, 6, 7], "label": 1, "task": "a"}, {"input_ids": [7, 6, 5], "label": 2, "task": "b"}]
    renamed = [{"input_ids": r["input_ids"], "labels": r["label"], "task": r["task"]} for r in examples]
    want, _ = rows_alone(model, renamed, "row")
    got, _ = step(model, examples, tmp_path, tf.default_data_collator, per_device_train_batch_size=2)
    assert_close(got, want)


def own_reading(examples):
    """A collator of a user that reads the tasks itself."""
    batch = TaskCollator(0, TASKS)([{k: v for k, v in row.items() if k != "task"} | {"task": 1} for row in examples])
    batch["task_ids"] = torch.tensor([TASKS.index(row["task"]) for row in examples])
    return batch


def own_getting(examples):
    """Another, that is content without."""
    tasks = [row.get("task", "b") for row in examples]
    return own_reading([{**row, "task": task} for row, task in zip(examples, tasks, strict=True)])


@pytest.mark.parametrize("collate", [own_reading, own_getting])
def test_a_collator_that_knows_tasks_gets_them(collate):
    model = build("Llama", "lm")
    batch = WithTasks(collate, TASKS)(rows(model, "lm"))
    assert batch["task_ids"].tolist() == [0, 1, 0, 1]


def test_a_batch_whose_rows_are_not_known_is_refused():
    def halves(examples):
        return {"input_ids": torch.zeros(2 * len(examples), 3, dtype=torch.long)}

    with pytest.raises(ValueError, match=r"shape \(8, 3\) from 4 rows: which task each part belongs to is not known"):
        WithTasks(halves, TASKS)(rows(build("Llama", "lm"), "lm"))
    with pytest.raises(KeyError, match="task"):
        WithTasks(halves, TASKS)([{"input_ids": [1], "task": "a"}, {"input_ids": [1]}])


@pytest.mark.parametrize(("family", "head"), [("Llama", "lm"), ("Bert", "row"), ("T5", "seq2seq")])
@pytest.mark.parametrize("stream", [False, True], ids=["set", "stream"])
def test_our_collator_under_stock_trainer(tmp_path, family, head, stream):
    model = build(family, head)
    examples = rows(model, head)
    want = rows_alone(model, examples, head)
    collate = TaskCollator(0, TASKS, model=model, ids_name="adapter_names")
    dataset = IterableDataset.from_generator(lambda: iter(examples)) if stream else examples
    assert_step(step(model, dataset, tmp_path, collate, tf.Trainer, remove_unused_columns=False, **WHOLE), want)


@pytest.mark.parametrize("workers", [0, 2])
def test_our_collator_in_any_loop(workers):
    model = build("GPT2", "lm")
    examples = rows(model, "lm")
    loader = torch.utils.data.DataLoader(
        examples, batch_size=4, collate_fn=TaskCollator(0, TASKS, model=model), num_workers=workers
    )
    batch = next(iter(loader))
    assert all(len(value) == 4 for value in batch.values())
    with torch.no_grad(), route(batch.pop("task_ids")):
        logits = model(**batch).logits
    for row, got in zip(examples, logits, strict=True):
        with torch.no_grad(), route(torch.tensor([TASKS.index(row["task"])])):
            want = model(**alone(row)).logits[0]
        torch.testing.assert_close(got[-len(want) :], want, rtol=1e-4, atol=1e-4)


def test_a_collator_that_sorts_is_refused():
    """Padded batches: each row would get the task of the row that was there before."""

    def collate(features, key=None):
        found = sorted(features, key=key) if key else features
        length = max(len(f["input_ids"]) for f in found)
        padded = [f["input_ids"] + [0] * (length - len(f["input_ids"])) for f in found]
        mask = [[int(i < len(f["input_ids"])) for i in range(length)] for f in found]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    given = [{"input_ids": [5], "task": TASKS[0]}, {"input_ids": [8, 9], "task": TASKS[1]}]
    assert WithTasks(collate, TASKS)(given)["task_ids"].tolist() == [0, 1]
    longest_first = WithTasks(lambda rows: collate(rows, lambda row: -len(row["input_ids"])), TASKS)
    with pytest.raises(ValueError, match="put row 1 of a batch into the place of row 0"):
        longest_first(given)
