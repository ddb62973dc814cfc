"""Two processes under gloo, DDP and FSDP2: what they train, log, save and refuse, against one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from transformers import TrainingArguments

from alora_kernels.training import ALoRATrainer
from alora_kernels.training.processes import own_rows

from ..support import manyprocesses as many
from ..support import trainers as t
from ..support.processes import gloo
from ..support.tiny import adapted

SAME = 2e-6  # largest difference of an entry after steps of 1e-2
# cases whose tensors are those of one process's run of a case
EQUAL = {
    "plain": "plain", "accumulated": "accumulated", "checkpointed": "accumulated", "absent": "absent",
    "streamed": "streamed", "saved": "saved", "resumed": "saved",
    "fsdp plain": "plain", "fsdp checkpointed": "accumulated", "fsdp absent": "absent", "fsdp saved": "saved",
    "fsdp resumed": "saved", "fsdp sharded": "saved", "fsdp sharded resumed": "saved",
    "experts": "experts", "experts saved": "experts saved", "fsdp experts": "experts",
    "fsdp experts saved": "experts saved", "fsdp experts resumed": "experts saved",
}  # fmt: skip

REFUSED = [
    ("no ids", "a batch of process 1 has no task_ids"),
    ("other tables", "process 0 has copy, next, zero; of process 1 it has zero, next, copy"),
    ("split stream", "split_dataset_by_node"),
    ("evaluated stream", "random access"),
    ("fsdp from ddp", "was written without FSDP"),
    ("ddp from fsdp", "was written under FSDP"),
    ("fsdp 1", "FSDP 1 is not supported"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run all cases, once for all workers of a test run."""
    place = (
        tmp_path_factory.getbasetemp().parent / f"processes-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    )
    with FileLock(f"{place}.lock"):
        if not place.exists():
            place.mkdir()
            gloo(2, "-m", many.__name__, str(place), *many.CASES)
    return place


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What this process finds alone in a case."""
    place, known = tmp_path_factory.mktemp("one"), {}

    def of(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = many.outcome(name, place)
        return known[name]

    yield of
    many.forget()


def two(folder: Path, name: str) -> list[dict[str, Any]]:
    """What every process found; its own traceback where a case failed."""
    found = list(many.results(folder, name, 2))
    assert not any("error" in each for each in found), found[0].get("trace") or found[-1].get("trace")
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) <= SAME, name


def test_every_case_is_judged():
    judged = {*EQUAL, "bf16", "fsdp bf16", "broken row", "left alone", *(name for name, _ in REFUSED)}
    assert judged == set(many.CASES)


@pytest.mark.parametrize("name", EQUAL)
def test_the_adapter_is_that_of_one_process(folder, one, name):
    wanted = one(EQUAL[name])["tensors"]
    for found in two(folder, name):
        assert_same(found["tensors"], wanted)


@pytest.mark.parametrize("name", ["fsdp resumed", "fsdp sharded resumed"])
def test_another_number_of_processes_goes_on_from_a_sharded_run(folder, one, name, monkeypatch):
    wanted = one("saved")["tensors"]
    for variable, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="localhost", MASTER_PORT=0).items():
        monkeypatch.setenv(variable, str(value))
    found = many.outcome(name, folder)
    torch.distributed.destroy_process_group()
    many.forget()
    assert_same(found["tensors"], wanted)


def test_one_process_goes_on_from_the_checkpoint_of_two(folder, one):
    found = many.resumed(folder / "one resumed", "ddp")
    assert_same(found["tensors"], one("saved")["tensors"])


@pytest.mark.parametrize("name", ["plain", "fsdp plain"])
def test_logs_and_evaluation_are_those_of_all_rows(folder, one, name):
    wanted = one("plain")
    for found in two(folder, name):
        steps, want = ([e for e in logs if "loss" in e] for logs in (found["logs"], wanted["logs"]))
        assert len(steps) == len(want) == 11
        for got, known in zip(steps, want, strict=True):
            losses = {k: v for k, v in known.items() if k.startswith("loss")}
            assert len(losses) > 2
            assert {k: v for k, v in got.items() if k.startswith("loss")} == pytest.approx(losses, rel=1e-5)
        metrics = {k: v for k, v in wanted["metrics"].items() if "loss" in k or "accuracy" in k}
        assert {k: found["metrics"][k] for k in metrics} == pytest.approx(metrics, rel=1e-5)
        assert any("task" not in k and k.endswith("_zero") for k in metrics)


@pytest.mark.parametrize("name", ["absent", "fsdp absent"])
def test_a_task_that_no_process_sees_stays_as_it_is(folder, name):
    found, zero = two(folder, name)[0], t.TASKS.index("zero")
    for key, before in found["before"].items():
        if "asymlora_A" in key:
            assert torch.equal(found["tensors"][key][zero], before[zero])
            assert not torch.equal(found["tensors"][key][0], before[0])


def test_a_bf16_base_is_as_exact_sharded_as_it_is_whole(folder, one):
    truth, start = one("absent")["tensors"], one("absent")["before"]
    whole = one("bf16")["tensors"]
    for name in ("bf16", "fsdp bf16"):
        found = two(folder, name)[0]["tensors"]
        for key, wanted in truth.items():
            assert found[key].dtype == torch.float32
            own = float((whole[key] - wanted).norm())
            assert float((found[key] - wanted).norm()) <= 2 * own + 1e-6
            assert own < 0.05 * float((wanted - start[key]).norm())


def test_every_process_sees_every_task_of_streams_in_turn(folder):
    assert [found["seen"] for found in two(folder, "streamed")] == [{"copy", "next"}] * 2


@pytest.mark.parametrize(("name", "words"), REFUSED)
def test_what_cannot_be_right_is_refused_by_every_process(folder, name, words):
    errors = [found.get("error", "") for found in many.results(folder, name, 2)]
    assert all(error.startswith("ValueError") and words in error for error in errors), errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate joins processes that have a GPU")
def test_processes_that_would_train_alone_are_refused(folder):
    for found in many.results(folder, "left alone", 2):
        assert "2 processes were started, and each would train alone" in found["error"]


def test_a_broken_row_of_one_process_ends_all(folder):
    first, second = (found["error"] for found in many.results(folder, "broken row", 2))
    assert first == "ValueError: process 1 could not use its batch and says why"
    assert second == "OSError: a broken file"


class Second:
    """What `own_rows` asks the second of two processes."""

    num_processes, process_index = 2, 1


def test_repeated_rows_count_for_nothing_where_labels_can_say_so():
    """An epoch of 2 rows, in batches of 2 per process: all rows of the second are repeated ones."""
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([1, 2])}
    assert own_rows(Second, batch, 2, 2)["labels"].tolist() == [-100]
    floats = batch | {"labels": torch.tensor([0.5, 0.25])}  # -100.0 would be a number to learn
    assert own_rows(Second, floats, 2, 2) is floats


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_rows_of_an_epoch_are_known_in_any_order(strategy, tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "task": ["math", "code"][i % 2]} for i in range(10)]
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], train_sampling_strategy=strategy)
    trainer = ALoRATrainer(adapted(), args, train_dataset=Dataset.from_list(rows))
    trainer.get_train_dataloader()
    assert trainer._drawn == 10


def test_a_sharded_checkpoint_of_other_tasks_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])
    adapted(tasks=["code", "math"]).peft_config["default"].save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"was written with tasks=\['code', 'math'\], here it is \['math', 'code'\]"):
        ALoRATrainer(adapted(), args)._check_sharded(tmp_path)
    ALoRATrainer(adapted(tasks=["code", "math"]), args)._check_sharded(tmp_path)


def test_several_gpus_of_one_process_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "task": "math"}]
    trainer = ALoRATrainer(adapted(), args, train_dataset=Dataset.from_list(rows))
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process has 2 GPUs: start one on each"):
        trainer.get_train_dataloader()
