"""Checkpoints are whole or not there, whenever their writer is killed; a damaged one is named and passed over."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from alora_kernels.training import ALoRATrainer
from alora_kernels.training.checkpoints import WRITING, WholeCheckpoints, damage, newest_whole
from tests.support.trainers import assert_equal, rows, states, trainer_on


class KilledError(BaseException):
    """Nobody handles it, as SIGKILL."""


def trainer(folder: Path, **more: Any) -> ALoRATrainer:
    return trainer_on(folder, rows(30), max_steps=6, save_strategy="steps", save_steps=2, **more)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_checkpoints_lie_where_they_are_looked_for(tmp_path):
    made = trainer(
        tmp_path, save_total_limit=2, eval_strategy="steps", eval_steps=2, eval_dataset=rows(6), learning_rate=0.5,
        optim="sgd", load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    made.train()
    best = Path(str(made.state.best_model_checkpoint))
    assert best.parent == tmp_path and best.is_dir()
    assert names(tmp_path) == {best.name, "checkpoint-6"} | ({"checkpoint-4"} if best.name == "checkpoint-6" else set())
    for folder in tmp_path.iterdir():
        assert not damage(folder)
        said = json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert Path(said).parent == tmp_path


@pytest.mark.parametrize(("every", "warned"), [(2, False), (1, True)])
def test_a_best_step_that_may_not_be_saved_is_warned_of(tmp_path, every, warned):
    how = {"eval_strategy": "steps", "eval_steps": every, "load_best_model_at_end": True, "eval_dataset": rows(6)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, **how)
    assert any("save_steps=1 saves each that is judged" in str(w.message) for w in caught) == warned


STAGES: dict[str, tuple[Any, str]] = {
    "model": (ALoRATrainer, "save_model"),
    "optimizer": (ALoRATrainer, "_save_optimizer_and_scheduler"),
    "random numbers": (ALoRATrainer, "_save_rng_state"),
    "state": (TrainerState, "save_to_json"),
    "rename": (os, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_whoever_is_killed_while_writing_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch, stage):
    whole = trainer(tmp_path / "whole")
    whole.train()
    (owner, name), calls = STAGES[stage], []
    act: Callable[..., Any] = getattr(owner, name)

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise KilledError
        return act(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(owner, name, killed)
        trainer(tmp_path / "run").train()
    assert names(tmp_path / "run") - {WRITING} == {"checkpoint-2"}
    last, skipped = newest_whole(tmp_path / "run")
    assert last == tmp_path / "run" / "checkpoint-2" and not skipped
    again = trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=str(last))
    assert_equal(states(whole), states(again))
    assert names(tmp_path / "run") == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("shared", [True, False])
def test_nodes_rename_in_turn_on_one_disk_or_on_disks_of_their_own(tmp_path, monkeypatch, shared):
    """Two nodes of two processes; one that looked while the other renames could remove its work."""
    here, seen, is_dir, rename = threading.local(), [], Path.is_dir, os.rename

    def looking(path: Path) -> bool:
        seen.append(("looks", here.index))
        return is_dir(path)

    def slowly(*paths: Path) -> None:
        time.sleep(0.2)
        rename(*paths)
        seen.append(("renamed", here.index))

    barrier, folders = threading.Barrier(4, timeout=20), [tmp_path / ("one" if shared else str(n)) for n in (0, 1)]
    for folder in folders:
        (folder / WRITING / "checkpoint-2").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(Path, "is_dir", looking)
    monkeypatch.setattr(os, "rename", slowly)

    def process(index: int) -> None:
        here.index = index
        one: Any = WholeCheckpoints.__new__(WholeCheckpoints)
        one.args = SimpleNamespace(
            process_index=index, local_process_index=index % 2, should_save=index == 0, save_total_limit=None
        )
        one.state = SimpleNamespace(global_step=2, best_model_checkpoint=None)
        one.accelerator = SimpleNamespace(wait_for_everyone=barrier.wait)
        one._finish(folders[index // 2] / WRITING, folders[index // 2])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(process, range(4)))
    assert ("looks", 2) not in seen[: seen.index(("renamed", 0))]
    assert all(names(folder) == {"checkpoint-2"} for folder in folders)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    """A bit in the middle, where the numbers are."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no state": ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
    "half a state": ("trainer_state.json", cut, "trainer_state.json is cut short"),
    "half an adapter": ("adapter_model.safetensors", cut, "cut short"),
    "a bit of an adapter": ("adapter_model.safetensors", flipped, "SHA-256"),
    "half an optimizer": ("optimizer.pt", cut, "zip"),
    "a bit of an optimizer": ("optimizer.pt", flipped, "optimizer.pt is damaged"),
    "half of the random numbers": ("rng_state.pth", cut, "zip"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(folder).train()
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(run, kind):
    name, spoil, said = DAMAGE[kind]
    path = run / "checkpoint-6" / name
    data = path.read_bytes()
    spoil(path)
    last, skipped = newest_whole(run)
    path.write_bytes(data)
    assert last == run / "checkpoint-4"
    assert skipped.keys() == {"checkpoint-6"} and said in skipped["checkpoint-6"]
    assert newest_whole(run) == (run / "checkpoint-6", {})


def test_a_folder_without_checkpoints(tmp_path):
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_whole(tmp_path) == (None, {})
