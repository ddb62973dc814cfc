"""Sampler, collator, and what a task may be called."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alora_kernels.modules.adapter import task_id, task_ids_from_names
from alora_kernels.training import TaskBalancedSampler, TaskCollator
from alora_kernels.training.loss import kept_positions

TASKS = ["big"] * 90 + ["small"] * 30


def test_similar_lengths_share_a_batch_and_every_batch_keeps_its_mix():
    tasks = ["short"] * 400 + ["long"] * 200
    lengths = [1 + i % 40 for i in range(400)] + [100 + i % 40 for i in range(200)]
    plain, grouped = (TaskBalancedSampler(tasks, seed=1, lengths=x, batch_size=24) for x in (None, lengths))
    for epoch in (0, 1):
        plain.set_epoch(epoch), grouped.set_epoch(epoch)
        order = list(grouped)
        assert order == list(grouped) and sorted(order) == sorted(plain)
        batches = [order[start : start + 24] for start in range(0, 600, 24)]
        assert all(7 <= sum(tasks[i] == "long" for i in batch) <= 9 for batch in batches)
        for task in ("short", "long"):
            spans = [[lengths[i] for i in batch if tasks[i] == task] for batch in batches]
            assert sum(max(span) - min(span) for span in spans) / len(spans) < 12  # of 40
    means = [sum(lengths[i] for i in batch) for batch in batches]
    assert means != sorted(means)  # batches come in no order
    with pytest.raises(ValueError, match="600 examples need as many lengths, got 3"):
        TaskBalancedSampler(tasks, lengths=[1, 2, 3])


def test_sampler_draws_everything_once_and_mixes():
    sampler = TaskBalancedSampler(TASKS, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(120))
    for start in range(0, 120, 8):  # every batch of eight is mixed about three to one
        small = sum(TASKS[i] == "small" for i in order[start : start + 8])
        assert 1 <= small <= 4


def test_sampler_temperature_balances():
    even = TaskBalancedSampler(TASKS, temperature=1e9)
    assert dict(even.counts) == {"big": 60, "small": 60}
    assert len(even) == len(list(even)) == 120
    drawn = [i for i in even if TASKS[i] == "small"]
    assert set(drawn) == set(range(90, 120))  # an example repeats only after all others came
    half = TaskBalancedSampler(TASKS, temperature=2)
    assert 60 < half.counts["big"] < 90


def test_sampler_weights_draw_a_task_so_many_times_as_often():
    plain = TaskBalancedSampler(TASKS, weights={"small": 2})
    assert plain.counts == {"big": 90, "small": 60} and len(list(plain)) == 150
    assert sorted(i for i in plain if TASKS[i] == "big") == list(range(90))  # the others as ever
    assert TaskBalancedSampler(TASKS, temperature=1e9, weights={"big": 0.5}).counts == {"big": 30, "small": 60}
    for wrong in ({"smal": 2}, {"small": 0}, {"small": float("inf")}):
        with pytest.raises(ValueError, match="weights are numbers above 0 of tasks that have examples"):
            TaskBalancedSampler(TASKS, weights=wrong)


def test_sampler_is_a_function_of_seed_and_epoch():
    one, other = TaskBalancedSampler(TASKS, seed=3), TaskBalancedSampler(TASKS, seed=3)
    first = list(one)
    assert first == list(one) == list(other)
    one.set_epoch(1)
    assert first != list(one)
    other.set_epoch(1)
    assert list(one) == list(other)
    assert first != list(TaskBalancedSampler(TASKS, seed=4))


def test_sampler_refuses_nonsense():
    with pytest.raises(ValueError, match="training set is empty"):
        TaskBalancedSampler([])
    with pytest.raises(ValueError, match="at least 1"):
        TaskBalancedSampler(TASKS, temperature=0.5)


FEATURES = [
    {"input_ids": [5, 6, 7, 8, 2], "labels": [-100, -100, -100, 8, 2], "task": "b"},
    {"input_ids": [9, 4, 2], "labels": [-100, 4, 2], "task": "a"},
    {"input_ids": [9, 3, 2], "labels": [-100, 3, 2], "task": "__base__"},
]


def test_collator_pads_left_and_names_tasks():
    batch = TaskCollator(0, ["a", "b"])(FEATURES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [0, 0, 9, 4, 2], [0, 0, 9, 3, 2]]
    assert batch["attention_mask"].tolist()[1] == [0, 0, 1, 1, 1]
    assert batch["position_ids"].tolist()[1] == [0, 0, 0, 1, 2]
    assert batch["labels"].tolist()[1] == [-100, -100, -100, 4, 2]
    assert batch["task_ids"].tolist() == [1, 0, -1]
    assert all(len(value) == 3 for value in batch.values())  # loaders cut every entry to the number of rows
    assert kept_positions(batch["labels"]).tolist() == [2, 3, 4]  # from the token before the first answer to the end
    assert TaskCollator(0, ["a", "b"], pad_to_multiple_of=4)(FEATURES)["input_ids"].shape == (3, 8)


def test_collator_errors():
    with pytest.raises(KeyError, match="no 'task', only input_ids"):
        TaskCollator(0, ["a"])([{"input_ids": [1]}])
    with pytest.raises(ValueError, match="unknown task 'c': valid tasks are a, b"):
        TaskCollator(0, ["a", "b"])([{"input_ids": [1], "task": "c"}])


@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
def test_sampler_groups_ids_by_value(make):
    sampler = TaskBalancedSampler(make([0] * 90 + [1] * 30), temperature=1e9)
    assert dict(sampler.counts) == {0: 60, 1: 60}
    assert list(sampler) == list(TaskBalancedSampler(TASKS, temperature=1e9))  # the same groups under names


@pytest.mark.parametrize(
    "task", [1, np.int64(1), np.array(1, np.uint8), torch.tensor(1), torch.tensor(1, dtype=torch.int16), np.str_("b")]
)
def test_a_task_is_a_name_or_any_integer(task):
    assert task_id(task, ["a", "b"]) == 1
    assert task_ids_from_names([task, "a", np.int32(-1)], ["a", "b"]).tolist() == [1, 0, -1]


@pytest.mark.parametrize("task", [True, np.bool_(True), 1.0, np.float32(1), torch.tensor(1.0), torch.tensor(2), None])
def test_what_is_no_task_is_refused(task):
    with pytest.raises(ValueError, match="unknown task .*: valid tasks are a, b"):
        task_id(task, ["a", "b"])
