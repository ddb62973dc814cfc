"""The server's checkpoint: a run that was cut is the run that was not, to the bit, with every strategy."""

from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
import wirefakes
from flwr.app import ArrayRecord
from wirefakes import arrays_of, play, record_of, wandering

from alora_kernels import files
from alora_kernels.federated import state, wire
from alora_kernels.federated.config import DpSettings
from alora_kernels.federated.state import CheckpointError
from alora_kernels.federated.strategies import STRATEGIES, privacy_spent

START = record_of(b=np.ones((2, 3)), a=np.zeros(4))
SETTINGS = {
    "no dp": None,
    "server clips": DpSettings(0.7, 1.0, accounting=False),
    "client clips": DpSettings(0.7, 1.0, accounting=False, side="client"),
}


def build(name: str = "fedavg", dp: DpSettings | None = None, **options: Any) -> Any:
    """Five of eight nodes are sampled, so that Python's generator matters."""
    return wirefakes.build(name, dp, population=8, **{"fraction_train": 5 / 8, **options})


def rounds(strategy: Any, arrays: ArrayRecord, numbers: list[int], **more: float) -> ArrayRecord:
    return play(strategy, arrays, numbers, wandering, nodes=8, metrics=lambda node: {"before-loss": node / 3, **more})


def seed() -> None:
    random.seed(7)
    np.random.seed(7)


def save(folder: Path, strategy: Any, arrays: Any = START, round_: int = 2) -> Path:
    return state.save(folder, round=round_, arrays=arrays, spec_hash="c0ffee", run="run-1", strategy=strategy)


def cut_and_whole(folder: Path, make: Any, **more: float) -> tuple[Any, Any, Any, Any]:
    """Four rounds in one go; two, a checkpoint, a fresh strategy in a process with other random numbers, two more."""
    seed()
    whole = make()
    straight = rounds(whole, START, [1, 2, 3, 4], **more)
    seed()
    first = make()
    half = rounds(first, START, [1, 2], **more)
    save(folder, first, half)
    random.seed(99)
    np.random.seed(99)
    second = make()
    saved = state.load(folder)
    state.restore(saved, second)
    resumed = rounds(second, wire.to_record(saved.arrays), [saved.round + 1, saved.round + 2], **more)
    return straight, resumed, whole, second


def assert_same(left: ArrayRecord, right: ArrayRecord) -> None:
    a, b = arrays_of(left), arrays_of(right)
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].tobytes() == b[key].tobytes(), key


@pytest.mark.parametrize("dp", SETTINGS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_cut_run_is_the_whole_run(tmp_path: Path, name: str, dp: str) -> None:
    straight, resumed, _, _ = cut_and_whole(tmp_path, lambda: build(name, SETTINGS[dp]))
    assert_same(straight, resumed)


@pytest.mark.parametrize("side", ["server", "client"])
def test_epsilon_goes_on(tmp_path: Path, side: Any) -> None:
    make = lambda: build(dp=DpSettings(0.7, 1.0, max_epsilon=50.0, side=side))  # noqa: E731
    straight, resumed, whole, second = cut_and_whole(tmp_path, make)
    assert_same(straight, resumed)
    assert privacy_spent(second) == privacy_spent(whole)
    assert privacy_spent(second)["num_releases"] == 4


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize("side", ["Server", "Client"])
def test_an_adaptive_clipping_norm_goes_on(tmp_path: Path, name: str, side: str) -> None:
    cls = getattr(flower, f"DifferentialPrivacy{side}SideAdaptiveClipping")
    settings = {"noise_multiplier": 0.1, "num_sampled_clients": 5, "initial_clipping_norm": 0.3}
    more = {"norm_bit": 1.0} if side == "Client" else {}
    straight, resumed, whole, second = cut_and_whole(tmp_path, lambda: cls(build(name), **settings), **more)
    assert_same(straight, resumed)
    assert second.clipping_norm == whole.clipping_norm != 0.3


@pytest.mark.parametrize("forget", ["state", "python", "numpy"])
def test_each_part_of_the_checkpoint_is_needed(tmp_path: Path, forget: str) -> None:
    """Without one of them the continuation differs: what the property above compares is no coincidence."""
    dp = DpSettings(0.7, 1.0, accounting=False)
    straight, _, _, _ = cut_and_whole(tmp_path, lambda: build("fedadam", dp))
    saved, second = state.load(tmp_path), build("fedadam", dp)
    state.restore(saved, second)
    if forget == "state":
        second = build("fedadam", dp)
    elif forget == "python":
        random.seed(99)
    else:
        np.random.seed(99)
    resumed = rounds(second, wire.to_record(saved.arrays), [3, 4])
    assert any((x != y).any() for x, y in zip(arrays_of(straight).values(), arrays_of(resumed).values()))


def test_everything_comes_back(tmp_path: Path) -> None:
    arrays = {
        "z": np.array([[np.nan, -0.0]], np.float32),
        "a": np.float64([1e-300, np.inf]),
        "s": np.float16(3),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = save(tmp_path / "new" / "folder", build(), arrays, round_=7)
    assert path == tmp_path / "new" / "folder" / "server.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    saved = state.load(path.parent)
    assert (saved.round, saved.spec_hash, saved.run) == (7, "c0ffee", "run-1")
    assert list(saved.arrays) == list(arrays)
    for key, value in arrays.items():
        got, wanted = saved.arrays[key], np.asarray(value)
        assert (got.dtype, got.shape, got.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def test_a_checkpoint_can_be_restored_twice(tmp_path: Path) -> None:
    seed()
    first = build("fedavgm")
    save(tmp_path, first, rounds(first, START, [1, 2]))
    saved = state.load(tmp_path)
    ends = []
    for _ in range(2):
        second = build("fedavgm")
        state.restore(saved, second)
        ends.append(rounds(second, wire.to_record(saved.arrays), [3, 4]))
    assert_same(*ends)


def test_no_file_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*server.safetensors; give the folder"):
        state.load(tmp_path)
    path = save(tmp_path, build())
    data = path.read_bytes()
    for damaged in (data[:-3], data[:-1] + bytes([data[-1] ^ 1]), b"", b"x" * 99):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"server.safetensors does not .*; restore the file from a backup"):
            state.load(tmp_path)
    files.write(path, {"w": torch.zeros(2)}, {"format": "alora-server-0"})
    with pytest.raises(CheckpointError, match="has format 'alora-server-0', this version reads 'alora-server-1'"):
        state.load(tmp_path)


PRIVATE = {"dp": DpSettings(0.7, 1.0)}


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ({"name": "fedadam"}, {}, "was written with FedAdam, the strategy now is FedAvg"),
        (
            {"name": "fedadam"},
            {"name": "fedadam", "dp": SETTINGS["server clips"]},
            "now is ServerSideClipping around Fed",
        ),
        ({"name": "fedadam"}, {"name": "fedadam", "eta": 0.2}, "FedAdam.eta was 0.1 .* is 0.2 now"),
        (PRIVATE, {"dp": DpSettings(0.7, 1.0, max_epsilon=9.0)}, "privacy accounting was .*None.* and is .*9.0"),
        (PRIVATE, {"dp": DpSettings(0.7, 1.0, accounting=False)}, "privacy accounting was .* and is None now"),
        (PRIVATE, {"dp": DpSettings(0.7, 2.0)}, "clipping_norm was 1.0"),
    ],
)
def test_another_strategy_or_other_settings(tmp_path: Path, was: Any, now: Any, words: str) -> None:
    strategy = build(**was)
    save(tmp_path, strategy, rounds(strategy, START, [1, 2]))
    saved, other = state.load(tmp_path), build(**now)
    random.seed(5)
    before = random.getstate()
    with pytest.raises(CheckpointError, match=words):
        state.restore(saved, other)
    assert random.getstate() == before


def test_a_run_may_go_on_with_a_smaller_quorum(tmp_path: Path) -> None:
    save(tmp_path, wirefakes.build("fedadam", population=8))
    smaller = wirefakes.build("fedadam", nodes=3, population=8, fraction_train=0.5)
    state.restore(state.load(tmp_path), smaller)
    assert (smaller.min_train_nodes, smaller.min_available_nodes, smaller.fraction_train) == (3, 3, 0.5)


def test_state_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    strategy = build()
    strategy.history = {"seen": {1, 2}}
    with pytest.raises(CheckpointError, match=r"FedAvg.history\['seen'\] is a set, which a checkpoint cannot hold"):
        save(tmp_path, strategy)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, build(), round_=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(CheckpointError, match=r"could not write .*No space left.*before it is untouched"):
            save(tmp_path, build(), round_=4)
    assert [path.name for path in tmp_path.iterdir()] == ["server.safetensors"]
    assert state.load(tmp_path).round == 3
