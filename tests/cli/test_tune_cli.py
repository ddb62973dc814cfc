"""`alora tune`: what it refuses, what it says, how it ends. No kernel runs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="what is tuned is Triton's")

from alora_kernels import precision
from alora_kernels.cli import doctor
from alora_kernels.cli import tune as command
from alora_kernels.data.models import layer_shapes
from alora_kernels.kernels import tiles, tuned
from alora_kernels.kernels.tuned import OK, Table
from alora_kernels.ops import dispatch
from alora_kernels.tuning import gpu, run
from tests.support.cli import alora, refused
from tests.tuning.fakes import KEY, FakeLayer, device


@pytest.fixture(autouse=True)
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU that never was; layers on which every plan is right."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.find.cache_clear()
    monkeypatch.setattr(tuned, "identity", lambda device: dict(KEY))
    monkeypatch.setattr(command, "gpu_of", lambda name: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(gpu, "Gpu", lambda place: device())
    monkeypatch.setattr(run, "Layer", FakeLayer)
    for name, empty in (("faults", {}), ("races", {}), ("asked", [])):
        monkeypatch.setattr(FakeLayer, name, empty)
    return tmp_path / "alora-kernels" / "tuned-fake-9000.json"


def test_a_run_says_what_it_found_and_where_it_is(chip: Path) -> None:
    FakeLayer.races = {"soft/one_pass": "differed from two launches within 50 runs"}
    text = alora("tune")
    assert "long square" in text and "base_first" in text and str(chip) in text
    assert "never taken: soft/one_pass: differed from two launches within 50 runs" in text
    assert "differed" in alora("tune")  # nothing left to do, the same said


def test_a_model_by_its_config(chip: Path) -> None:
    assert set(layer_shapes("tiny-random")) == {(64, 64), (64, 32), (64, 128), (128, 64)}
    text = alora("tune", "tiny-random", "--tasks", 4)
    assert "long 64x128" in text and "decode 128x64" in text and "long square" not in text
    assert "could not load" in refused("tune", "/no/such/model")


def test_a_table_of_another_version_is_said_and_measured_anew(chip: Path) -> None:
    Table({**KEY, "driver": "0.9"}, verdicts={"task/one_pass": "wrong"}).save()
    assert "driver 0.9" in alora("tune")
    found = tuned.read(KEY).table
    assert found is not None and found.verdicts["task/one_pass"] == OK


def test_again_forgets(chip: Path) -> None:
    Table(dict(KEY), verdicts={"task/one_pass": "wrong"}).save()
    assert "never taken: task/one_pass: wrong" in alora("tune")
    assert "never taken" not in alora("tune", "--again")


def test_ctrl_c(chip: Path) -> None:
    FakeLayer.faults = {"task/low_rank_first": KeyboardInterrupt()}
    text = alora("tune", code=130)
    assert "interrupted: run it again to go on" in text and str(chip) in text
    assert tuned.read(KEY).table is not None


def test_a_lost_device(chip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLayer.faults = {"task/one_pass": RuntimeError("CUDA error: misaligned")}
    monkeypatch.setattr(gpu, "Gpu", lambda place: device(alive=lambda: 1 / 0))
    text = alora("tune", code=1)
    assert "the GPU answers no more: task/one_pass: RuntimeError: CUDA error: misaligned" in text and str(chip) in text


def test_a_budget(chip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(gpu, "Gpu", lambda place: device(now=lambda: next(clock)))
    assert "the budget ended with" in alora("tune", "--budget", "3s")
    assert "the budget" not in alora("tune", "--budget", "2h")


@pytest.mark.parametrize(("text", "seconds"), [("120", 120), ("120s", 120), ("2m", 120), ("1.5 m", 90), ("1h", 3600)])
def test_budgets(text: str, seconds: float) -> None:
    assert command.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "2 days", "1e3", "m"])
def test_wrong_budgets(text: str) -> None:
    assert "120, 120s or 2m" in refused("tune", f"--budget={text}")


def test_a_folder_that_cannot_be_written(chip: Path) -> None:
    chip.parent.write_text("a file")
    assert "set XDG_CACHE_HOME" in refused("tune") and not FakeLayer.asked


def test_a_user_without_a_home(chip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert tuned.read(KEY).table is None
    assert "no home" in refused("tune") and not FakeLayer.asked


GPU_OF = command.gpu_of


@pytest.mark.parametrize(
    ("gpus", "interprets", "name", "words"),
    [
        (0, False, "cuda:0", "no CUDA or ROCm device here"),
        (1, True, "cuda:0", "TRITON_INTERPRET is set"),
        (2, False, "cuda:2", "cuda:0, cuda:1"),
        (2, False, "cpu", "cuda:0, cuda:1"),
    ],
)
def test_refusals(gpus: int, interprets: bool, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "gpu_of", GPU_OF)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dispatch, "interpreting", lambda: interprets)
    assert words in " ".join(refused("tune", "--device", name).split())


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "explain", lambda *_: dispatch.Choice("triton", "because"))
    assert [GPU_OF(name).index for name in ("cuda", "cuda:1", "1")] == [0, 1, 1]


def test_where_no_plan_is_right_it_ends_red(chip: Path) -> None:
    FakeLayer.faults = {f"{r}/{p}": RuntimeError("no C compiler") for r in run.ROUTINGS for p in dispatch.PLANS}
    text = alora("tune", code=1)
    assert "no C compiler" in text and "alora tune --again" in text


@pytest.mark.parametrize("state", ["never", "old", "tuned"])
def test_doctor_says_whether_a_chip_is_qualified(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_devices", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(doctor, "_device_name", lambda device: "some chip")
    monkeypatch.setattr(doctor, "_choice", lambda device: dispatch.Choice("triton", "because"))
    monkeypatch.setattr(precision, "explain", lambda _: SimpleNamespace(name="bfloat16", reason="because"))
    monkeypatch.setattr(tiles, "_device_chip", lambda device: "sm_90")
    plans = {"task/2/long square": {"plan": ["one_pass", "fused", False]}}
    if state != "never":
        key = KEY if state == "tuned" else {**KEY, "torch": "1.0"}
        Table(dict(key), verdicts={"task/one_pass": OK, "soft/one_pass": "y is off"}, plans=plans).save()
    text = " ".join(alora("doctor").split())
    if state == "tuned":
        assert "cuda:0 is qualified: tuned 20" in text and "one_pass; dx fused" in text
        assert "soft/one_pass: y is off" in text
    else:
        assert "cuda:0 is not qualified for one-pass kernels" in text and "alora tune" in text
        assert ("torch 1.0" in text) == (state == "old") and "one_pass; dx" not in text
