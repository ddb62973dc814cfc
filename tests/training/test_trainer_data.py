"""`ALoRATrainer` on data of every kind: streams, lists, torch datasets; their orders, and that of a batch's rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data import Dataset as TorchDataset

from alora_kernels.training import TaskBalancedSampler
from alora_kernels.training.tasks import side_by_side
from tests.support import families
from tests.support.trainers import (
    TASKS,
    assert_close,
    logs_of,
    own_loss,
    peft_model,
    rows,
    states,
    texts,
    trainer_on,
)


class Rows(TorchDataset):
    """A map-style dataset that counts how often it is read."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.reads = list(data), 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        return dict(self.data[index])


class Stream(IterableDataset):
    def __init__(self, data: Dataset, *, endless: bool = False) -> None:
        self.data, self.endless, self.started = list(data), endless, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.started += 1
        yield from (dict(row) for row in self.data)
        while self.endless:
            yield from (dict(row) for row in self.data)


KINDS = {
    "list": list,
    "map-style": Rows,
    "subset": lambda data: Subset(Rows(data), range(len(data))),
    "subset of a Dataset": lambda data: Subset(data, range(len(data))),
    "concatenated": lambda data: ConcatDataset([Rows(data.select(range(10))), data.select(range(10, len(data)))]),
    "tensors": lambda data: data.with_format("torch"),
    "stream": Stream,
    "endless stream": lambda data: Stream(data, endless=True),
    "datasets stream": lambda data: data.to_iterable_dataset(),
    "datasets stream from a generator": lambda data: datasets.IterableDataset.from_generator(
        lambda: (dict(row) for row in data)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_dataset_trains_as_the_same_rows_in_a_dataset(tmp_path, kind):
    data = rows(22)  # 22 rows in batches of 6: the last one is not full
    want, got = (trainer_on(tmp_path, d, train_sampling_strategy="sequential") for d in (data, KINDS[kind](data)))
    want.train()
    got.train()
    for mine, other in zip(got.state.log_history, want.state.log_history, strict=True):
        for key in ("loss", *(f"loss_{task}" for task in TASKS)):
            if key in other and not ("endless" in kind and mine["step"] == 4):  # whose fourth batch is full
                assert mine[key] == pytest.approx(other[key], rel=1e-5), key
    if "endless" not in kind:
        assert_close(states(got), states(want), rtol=1.3e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("made", [Stream, lambda data: data.to_iterable_dataset()], ids=["torch", "datasets"])
def test_a_stream_trains_on_the_models_own_loss(tmp_path, made, dispatch, accumulate):
    """Five rows, two a batch, so the last batch is not full; a learning rate of 0 keeps the model as it was."""
    data = texts(5)
    trainer = trainer_on(
        tmp_path, made(data), max_steps=3 if accumulate == 1 else 1, per_device_train_batch_size=2, learning_rate=0.0,
        accelerator_config={"dispatch_batches": dispatch}, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer.train()
    parts = ([0, 1], [2, 3], [4]) if accumulate == 1 else ([0, 1, 2, 3],)
    want = [own_loss(trainer.model, data.select(part)) for part in parts]
    assert [entry["loss"] for entry in logs_of(trainer)] == pytest.approx(want, rel=1e-4)
    metrics = trainer.evaluate(made(data))
    assert metrics["eval_loss"] == pytest.approx(own_loss(trainer.model, data), rel=0.05)  # a mean of means


def test_a_stream_trains_a_model_that_takes_no_ids(tmp_path):
    """Its names would only be for the logs, and reading them would take the whole stream."""
    trainer = trainer_on(tmp_path, Stream(texts(5)), peft_model("soft"))
    trainer.train()
    assert len(logs_of(trainer)) == 4
    assert not any(key.startswith("loss_") for entry in logs_of(trainer) for key in entry)


def test_making_a_trainer_does_not_read_the_data(tmp_path):
    endless, costly = Stream(rows(6), endless=True), Rows(rows(6))
    trainer_on(tmp_path, endless, eval_dataset=costly)
    assert endless.started == 0
    assert costly.reads <= 1  # one row, to say what is missing
    assert isinstance(trainer_on(tmp_path, costly)._get_train_sampler(), RandomSampler)
    assert isinstance(trainer_on(tmp_path, costly, task_temperature=5)._get_train_sampler(), TaskBalancedSampler)


def _spread(order: Any, data: Any) -> float:
    """Slots of padding in batches of six."""
    lengths = [len(data[i]["input_ids"]) for i in order]
    return sum(max(batch) * len(batch) - sum(batch) for batch in _batches(lengths, 6))


def _batches(rows: Any, size: int) -> list[list[int]]:
    every = list(rows)
    return [every[start : start + size] for start in range(0, len(every), size)]


def test_orders_are_trainers_own_or_refused(tmp_path):
    def sampler(strategy: str, data: Any, **options: Any) -> Any:
        return trainer_on(tmp_path, data, train_sampling_strategy=strategy, **options)._get_train_sampler()

    assert isinstance(sampler("random", rows(9)), TaskBalancedSampler)
    assert isinstance(sampler("sequential", rows(9)), SequentialSampler)
    for data in (rows(90), rows(90).to_list()):
        grouped, plain = (
            sampler("group_by_length", data, task_temperature=2),
            sampler("random", data, task_temperature=2),
        )
        assert sorted(grouped) == sorted(plain) and list(grouped) != list(plain)
        assert _spread(grouped, data) < 0.7 * _spread(plain, data)
    told = rows(90).add_column("length", [i % 2 for i in range(90)])
    alike = [len({i % 2 for i in batch}) == 1 for batch in _batches(sampler("group_by_length", told), 6)]
    assert sum(alike) >= 8  # of 15: within three batches one has both lengths
    assert sorted(i for batch in sampler("batch_rebalance", rows(9)) for i in batch) == list(range(9))
    with pytest.raises(ValueError, match="task_temperature=2 draws rows task by task, but train_sampling_strategy is"):
        sampler("sequential", rows(9), task_temperature=2)
    with pytest.raises(ValueError, match="a stream has its own order: leave it at 1; datasets.interleave_datasets"):
        sampler("random", Stream(rows(9)), task_temperature=2)
    assert len(sampler("random", rows(9), task_weights={TASKS[0]: 3})) > 9
    with pytest.raises(
        ValueError, match="task_weights=.* draws rows task by task, but a stream has its own order: leave"
    ):
        sampler("random", Stream(rows(9)), task_weights={TASKS[0]: 3})
    with pytest.raises(ValueError, match="'group_by_length' needs a dataset with random access"):
        sampler("group_by_length", Stream(rows(9)))


def test_bad_rows_are_named_before_training(tmp_path):
    wrong = [{**row, "task": "copi"} for row in rows(3)]
    for bad in (wrong, Dataset.from_list(wrong), Subset(wrong, [1]), ConcatDataset([rows(3), wrong])):
        with pytest.raises(ValueError, match="unknown task 'copi': valid tasks are copy, next, zero"):
            trainer_on(tmp_path, bad)
    with pytest.raises(ValueError, match="unknown task 'copi'"):
        trainer_on(tmp_path, rows(3), eval_dataset={"one": rows(3), "two": Dataset.from_list(wrong)})
    without = rows(3).remove_columns("task")
    for bad in (without, list(without), Rows(without), without.to_iterable_dataset()):
        with pytest.raises(ValueError, match="train_dataset has no `task` column"):
            trainer_on(tmp_path, bad)
    with pytest.raises(ValueError, match="a row of train_dataset is a tuple"):
        trainer_on(tmp_path, [([1, 2], [1, 2])])
    with pytest.raises(ValueError, match="train_dataset holds train, test: pass one of them"):
        trainer_on(tmp_path, DatasetDict(train=rows(3), test=rows(3)))
    with pytest.raises(ValueError, match="no ALoRA layer"):
        trainer_on(tmp_path, rows(6), torch.nn.Linear(2, 2))


def test_several_evaluation_sets(tmp_path):
    parts = DatasetDict(one=rows(6), two=rows(9, seed=3))
    metrics = trainer_on(tmp_path, rows(6), eval_dataset=parts).evaluate()
    assert {"eval_one_loss", "eval_two_loss", "eval_one_accuracy_copy", "eval_two_accuracy_zero"} <= set(metrics)


def test_a_transform_that_makes_the_task_is_not_asked_for_a_column(tmp_path):
    data = rows(12).rename_column("task", "kind")
    made = data.with_transform(lambda batch: {**{k: batch[k] for k in ("input_ids", "labels")}, "task": batch["kind"]})
    trainer = trainer_on(tmp_path, made, remove_unused_columns=False)
    trainer.train()
    assert any("loss_copy" in entry for entry in logs_of(trainer))


# ---- rows inside a step: sorted by task where everything is known to be per row, else kept

IDS = torch.tensor([2, 0, 1, 0])
TEXT = {"input_ids": torch.arange(12).view(4, 3), "attention_mask": torch.ones(4, 3), "labels": torch.arange(4)}
KEPT: dict[str, dict[str, Any]] = {
    "as many images as rows": {"pixel_values": torch.randn(4, 3, 2, 2)},
    "patches": {"pixel_values": torch.randn(4, 24), "image_grid_thw": torch.ones(4, 3, dtype=torch.long)},
    "one position for all rows": {"position_ids": torch.arange(3)[None]},
    "positions in three dimensions": {"position_ids": torch.zeros(3, 4, 3, dtype=torch.long)},
    "as many sections as rows": {"position_ids": torch.zeros(4, 3, 3, dtype=torch.long)},
    "packed": {"cu_seq_lens_q": torch.arange(4), "max_length_q": 3},
    "texts": {"prompts": ["a", "b", "c", "d"]},
    "a mask of a square": {"attention_mask": torch.ones(4, 1, 3, 3)},
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_batch_with_anything_else_keeps_its_order(kind):
    batch = {**TEXT, "task_ids": IDS, **KEPT[kind]}
    assert side_by_side(batch) is batch


def test_rows_of_a_task_come_together():
    batch = {**TEXT, "task_ids": IDS, "token_type_ids": torch.arange(12).view(4, 3) + 100}
    after = side_by_side(batch)
    assert after["task_ids"].tolist() == [0, 0, 1, 2]
    assert after["input_ids"][:, 0].tolist() == [3, 9, 6, 0]
    assert after["labels"].tolist() == [1, 3, 2, 0]
    assert after["token_type_ids"][:, 0].tolist() == [103, 109, 106, 100]
    per_token = {**TEXT, "task_ids": IDS.repeat_interleave(3).view(4, 3)}
    assert side_by_side(per_token) is per_token


@pytest.mark.parametrize("kind", ["decoder", "classifier with segments"])
def test_values_and_gradients_do_not_depend_on_the_order(tmp_path, kind, monkeypatch):
    if kind == "decoder":
        model, data = peft_model(), rows(7)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    else:
        model = families.build("Bert", "row")
        data = Dataset.from_list(families.rows(model, "row"))
        data = data.add_column("token_type_ids", [[i % 2 for i in range(len(ids))] for ids in data["input_ids"]])
    trainer = trainer_on(tmp_path, data, model)
    batch = trainer.data_collator(list(data))
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    sort = side_by_side
    moved = []
    for function in (lambda b: moved.append(not torch.equal(sort(b)["task_ids"], b["task_ids"])) or sort(b), dict):
        monkeypatch.setattr("alora_kernels.training.tasks.side_by_side", function)
        model.train()
        model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert moved == [True]
    torch.testing.assert_close(found[0][0], found[1][0])
    assert any(g.abs().max() > 0 for n, g in found[0][1].items() if "lora_A" in n)
    assert_close(found[0][1], found[1][1], rtol=1.3e-6)
