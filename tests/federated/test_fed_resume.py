"""Whatever is killed, and whenever: the run goes on to the arrays of an uninterrupted one; nothing saved is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import toy

from alora_kernels import files
from alora_kernels.federated import FedConfig, state
from alora_kernels.federated.config import DpSettings, StrategyConfig
from alora_kernels.federated.log import Outcome, read
from alora_kernels.federated.server import LEDGER, clear

ROUNDS = 4
DP = DpSettings(noise_multiplier=0.5, clipping_norm=0.5, delta=1e-3)
VARIANTS: dict[str, dict] = {
    "fedavg": {},
    "fedsa": {"method": "fedsa-lora"},
    "unequal": {"method": "fed-alora-het", "clients": [{"name": n, "rank": r} for n, r in zip(toy.NAMES, (1, 2, 4))]},
    "fedadam": {"strategy": StrategyConfig(name="fedadam", options={"eta": 0.05})},
    "fedavgm": {"strategy": StrategyConfig(name="fedavgm", options={"server_momentum": 0.9})},
    "sampled": {"strategy": StrategyConfig(options={"fraction_train": 0.7}), "clients": list(toy.NAMES)},
    "clipped": {"dp": DP, "weights": "equal"},
}


class KilledError(BaseException):
    """Like SIGKILL, it is nobody's to handle."""


def config_for(folder: Path, variant: str, **changes: object) -> FedConfig:
    return toy.config(folder, **{"rounds": ROUNDS, **VARIANTS[variant], **changes})


def killer(after: int) -> Callable:
    """A tap that kills the process at the n-th message."""
    count = 0

    def tap(_: object) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise KilledError

    return tap


def same(a: Outcome, b: Outcome) -> None:
    toy.same(a.arrays, b.arrays)
    assert a.final == b.final


def story(outcome: Outcome) -> list[dict]:
    """A ledger without what differs from run to run."""
    changing = ("time", "seconds", "run", "resumed_at")
    events = [{k: v for k, v in e.items() if k not in changing} for e in outcome.events]
    return [e for e in events if e["event"] != "run"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("after", [2, 8, 13, 21])
def test_a_killed_server_resumes_to_the_same_arrays(variant, after, tmp_path, monkeypatch):
    """Killed in the first round, between clients, after all trained, and near the end (6 messages make a round)."""
    np.random.seed(5)  # a run with noise takes new entropy; here the two runs must be comparable
    monkeypatch.setattr(np.random, "seed", lambda *_: None)
    state = np.random.get_state()
    whole = toy.go(config_for(tmp_path / "whole", variant))
    assert whole.status == "finished"
    np.random.set_state(state)
    config = config_for(tmp_path / "cut", variant)
    with pytest.raises(KilledError):
        toy.go(config, on_message=killer(after))
    np.random.random(17)  # a new process has another state
    resumed = toy.go(config, resume=True)
    same(whole, resumed)
    assert story(whole) == story(resumed)


def test_more_rounds_later_are_the_same_as_more_rounds_at_once(tmp_path):
    config = config_for(tmp_path / "whole", "fedavg")
    whole = toy.go(config)
    toy.go(config_for(tmp_path / "cut", "fedavg", rounds=2))
    same(whole, toy.go(config_for(tmp_path / "cut", "fedavg"), resume=True))
    with pytest.raises(FileExistsError, match="--resume, replace it with --overwrite, or choose another output"):
        toy.go(config)
    assert read(config.output / LEDGER) == whole.events
    same(whole, toy.go(config, resume=True))  # a finished run resumes to itself


def test_killed_before_the_first_checkpoint(tmp_path, monkeypatch):
    """There is a ledger, with nothing in it but that a run began: a fresh start may take the folder."""
    config = config_for(tmp_path / "out", "fedavg")
    with monkeypatch.context() as patch:
        full_disk(patch, "server.safetensors", after=1)
        assert toy.go(config).status == "stopped"
    assert (config.output / LEDGER).exists() and not (config.output / state.CHECKPOINT).exists()
    same(toy.go(config), toy.go(config_for(tmp_path / "whole", "fedavg")))


def test_a_ledger_with_rounds_and_no_checkpoint_is_not_touched(tmp_path):
    config = config_for(tmp_path / "out", "fedavg", rounds=1)
    events = toy.go(config).events
    (config.output / state.CHECKPOINT).unlink()
    with pytest.raises(FileExistsError, match="resume"):
        toy.go(config)
    assert read(config.output / LEDGER) == events


def test_two_runs_at_once_in_one_folder_are_refused_and_the_first_goes_on(tmp_path):
    config, refused = config_for(tmp_path / "out", "fedavg", rounds=1), []

    def second(_: object) -> None:
        for act in (lambda: toy.go(config, resume=True), lambda: clear(config.output)):
            with pytest.raises(ValueError, match=f"process {os.getpid()} is writing into {config.output}") as caught:
                act()
            refused.append(caught)

    assert toy.go(config, on_message=second).status == "finished" and refused
    clear(config.output)
    assert not (config.output / LEDGER).exists()


@pytest.mark.parametrize("change", [{"rank": 3}, {"method": "ffa-lora"}, {"seed": 1}])
def test_resuming_nothing_or_with_another_configuration_is_refused(change, tmp_path):
    with pytest.raises(state.CheckpointError, match="there is no checkpoint"):
        toy.go(config_for(tmp_path / "out", "fedavg"), resume=True)
    toy.go(config_for(tmp_path / "out", "fedavg", rounds=1))
    with pytest.raises(state.CheckpointError, match="same configuration"):
        toy.go(config_for(tmp_path / "out", "fedavg", **change), resume=True)


def full_disk(monkeypatch: pytest.MonkeyPatch, what: str, after: int) -> None:
    """Writes to files of that name fail from the n-th on."""
    real, count = files.write, 0

    def write(path: Path, *rest: object) -> None:
        nonlocal count
        if what in str(path):
            count += 1
            if count >= after:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *rest)

    monkeypatch.setattr(files, "write", write)


def test_a_client_with_a_full_disk_is_left_out_and_takes_part_again(tmp_path, monkeypatch):
    config = config_for(tmp_path / "out", "fedavg")
    with monkeypatch.context() as patch:
        full_disk(patch, "/bob/round-", after=2)
        outcome = toy.go(config)
    assert outcome.status == "finished"
    refused = [(e["round"], e["client"]) for e in outcome.rejections]
    assert refused == [(n, "bob") for n in (2, 3, 4)]
    assert all(e["reason"] == "StoreError: No space left on device" for e in outcome.rejections)
    kept = sorted(p.name for p in (tmp_path / "out" / "clients").glob("*/bob/round-*"))
    assert kept == ["round-000001.safetensors"]
    more = toy.go(config_for(tmp_path / "out", "fedavg", rounds=ROUNDS + 1), resume=True)
    assert [e["round"] for e in more.rejections] == [2, 3, 4]  # with room again, round 5 counts


def test_a_server_with_a_full_disk_stops_and_resumes_to_the_same_arrays(tmp_path, monkeypatch):
    whole = toy.go(config_for(tmp_path / "whole", "fedavg"))
    config = config_for(tmp_path / "out", "fedavg")
    with monkeypatch.context() as patch:
        full_disk(patch, "server.safetensors", after=4)  # the first is round 0
        stopped = toy.go(config)
    assert (stopped.status, stopped.rounds) == ("stopped", 2)
    assert "No space left on device" in str(stopped.reason)
    same(whole, toy.go(config, resume=True))


def test_an_interrupt_leaves_a_ledger_that_says_so(tmp_path):
    config = config_for(tmp_path / "out", "fedavg")

    def tap(message: object) -> None:
        if message.metadata.group_id == "2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.go(config, on_message=tap)
    assert read(config.output / LEDGER)[-1]["reason"] == "interrupted"
    assert toy.go(config, resume=True).status == "finished"


def test_a_client_ahead_of_an_old_checkpoint_says_so(tmp_path):
    """A server restored from a backup asks for rounds that the client no longer keeps."""
    config = config_for(tmp_path / "out", "fedavg", rounds=1)
    toy.go(config)
    backup = (config.output / state.CHECKPOINT).read_bytes()
    toy.go(config_for(tmp_path / "out", "fedavg", rounds=4), resume=True)
    (config.output / state.CHECKPOINT).write_bytes(backup)
    outcome = toy.go(config_for(tmp_path / "out", "fedavg", rounds=2), resume=True)
    assert [e["round"] for e in outcome.rejections] == [2, 2, 2]
    assert all("older" in e["reason"] for e in outcome.rejections)
    assert len(list((tmp_path / "out" / "clients").glob("*/*/round-*"))) == 6  # and nothing was deleted
