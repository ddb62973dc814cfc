"""The table of a user: who reads it, when it counts, what is said where it does not."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alora_kernels.kernels import tiles, tuned
from alora_kernels.kernels.tuned import NEVER, OK, Table
from alora_kernels.ops.dispatch import PLANS, BackendError, Plan, explain_plan
from alora_kernels.ops.triton_backend import plan_on

from .fakes import CPU, KEY

OTHER = {**KEY, "chip": "Fake 10 (PCIe)"}
TWO = torch.device("cuda", 0), torch.device("cuda", 1)
LAYER = ("task", 2, 4096, 4096, 1024)


@pytest.fixture
def two_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of different kinds in one machine."""
    monkeypatch.setattr(tuned, "identity", lambda device: dict(KEY if device == TWO[0] else OTHER))
    monkeypatch.setattr(tiles, "_device_chip", lambda device: "sm_90")


def entry(*plan: Any) -> dict[str, Any]:
    return {"plan": list(plan), "layer": [8, 16], "ms": {}}


def test_each_chip_has_its_own(two_chips: None, cache: Path) -> None:
    Table(
        dict(KEY), plans={"task/2/long tall": entry("one_pass", "fused", True)}, tiles={"da/2/": [64, 64, 64, 4, 3, 1]}
    ).save()
    assert [path.name for path in cache.iterdir()] == ["tuned-fake-9000.json"]
    assert plan_on(TWO[0], *LAYER)[0] == Plan("one_pass", "fused", True)
    assert plan_on(TWO[1], *LAYER)[0] == explain_plan("sm_90", *LAYER)[0]
    assert tiles.tile_for("da", TWO[0], torch.bfloat16) == tiles.Tile(64, 64, 64, 4, 3)
    assert tiles.tile_for("da", TWO[0], torch.float32) == tiles.tile_for("da", TWO[1], torch.float32)
    assert tiles.tile_for("da", TWO[1], torch.bfloat16) != tiles.Tile(64, 64, 64, 4, 3)
    Table(dict(OTHER), plans={"task/2/long tall": entry("two_launch", "fused", False)}).save()
    assert plan_on(TWO[1], *LAYER)[0] == PLANS["two_launch"]


def test_just_this_layer_comes_before_its_class(two_chips: None) -> None:
    plans = {
        "task/2/long tall": entry("two_launch", "fused", False),
        "task/2/long 4096x1024": entry("one_pass", "fused", False),
    }
    Table(dict(KEY), plans=plans).save()
    plan, reason = plan_on(TWO[0], *LAYER)
    assert plan == PLANS["one_pass"] and "measured on this chip" in reason
    assert plan_on(TWO[0], "task", 2, 4096, 8192, 1024)[0] == PLANS["two_launch"]
    assert plan_on(TWO[0], "soft", 2, 4096, 4096, 1024)[0] == explain_plan("sm_90", "soft", 2, 4096, 4096, 1024)[0]


def test_a_plan_that_failed_here_is_not_taken_from_elsewhere(two_chips: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "PLANS", {("sm_90", "task", 2, "long tall"): ("two_launch", "fused", False)})
    assert plan_on(TWO[0], *LAYER)[0] == PLANS["two_launch"]
    Table(
        dict(KEY), verdicts={"task/two_launch": "y is off", "task/base_first": "y is off", "task/low_rank_first": OK}
    ).save()
    plan, reason = plan_on(TWO[0], *LAYER)
    assert plan == PLANS["low_rank_first"] and "y is off" in reason


def test_where_all_plans_failed_no_wrong_number_is_made(two_chips: None) -> None:
    Table(dict(KEY), verdicts={f"task/{plan}": "y is off" for plan in PLANS}).save()
    with pytest.raises(BackendError, match="y is off.*ALORA_BACKEND=torch"):
        plan_on(TWO[0], *LAYER)
    assert plan_on(TWO[0], "soft", *LAYER[1:])[0] == PLANS["base_first"]


def test_one_pass_is_taken_only_where_it_was_proven(two_chips: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "PLANS", {("sm_90", "task", 2, "long tall"): ("one_pass", "fused", False)})
    plan, reason = plan_on(TWO[0], *LAYER)
    assert plan.forward != "one_pass" and "alora tune" in reason
    Table(dict(KEY), verdicts={"task/one_pass": OK}).save()
    assert plan_on(TWO[0], *LAYER)[0] == PLANS["one_pass"]


@pytest.mark.parametrize("name", [name for name in KEY if name != "chip"])
def test_a_table_of_another_version_does_not_count(
    name: str, two_chips: None, caplog: pytest.LogCaptureFixture
) -> None:
    Table({**KEY, name: "0.0"}, plans={"task/2/long tall": entry("one_pass", "fused", False)}).save()
    with caplog.at_level(logging.INFO):
        assert plan_on(TWO[0], *LAYER)[0].forward != "one_pass"
        plan_on(TWO[0], *LAYER)
    (record,) = caplog.records
    assert (
        record.levelno == logging.WARNING
        and f"{name} 0.0" in record.getMessage()
        and "alora tune" in record.getMessage()
    )


def test_a_chip_that_was_never_tuned_is_said_once(two_chips: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for device in (TWO[0], TWO[0], TWO[1]):
            plan_on(device, *LAYER)
            tiles.tile_for("da", device, torch.bfloat16)
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
    assert NEVER in caplog.text and "Fake 9000" in caplog.text


DAMAGED = ["", "{", "[]", "null", '{"key": {}}', '{"key": 3}', '{"chip": "Fake 9000"}']


@pytest.mark.parametrize("text", [*DAMAGED, "plans", "tiles", "verdicts"])
def test_a_damaged_table_does_not_count(text: str, cache: Path) -> None:
    wrong: dict[str, Any] = {
        "plans": {"task/2/x": {"plan": [1, 2, 3]}},
        "tiles": {"da/2/": [1, 2]},
        "verdicts": {"a": 1},
    }
    cache.mkdir()
    whole = {"key": KEY, text: wrong[text]} if text in wrong else None
    tuned.path_of(KEY).write_text(json.dumps(whole) if whole else text)
    found = tuned.read(KEY)
    assert found.table is None and "does not read" in found.why


def test_what_is_saved_reads_back() -> None:
    plans = {"soft/2/long wide": entry("one_pass", "fused", True), "a/2/b": {"plan": None}}
    tiles = {"da/2/": [64, 64, 64, 4, 3, 1], "gemm/2/long wide": None}
    table = Table(dict(KEY), verdicts={"task/one_pass": OK}, plans=plans, tiles=tiles)  # type: ignore[arg-type]
    table.save()
    assert tuned.read(KEY).table == table


def test_a_reader_never_sees_half_a_table(cache: Path) -> None:
    """Ranks of a job read while a user tunes."""
    Table(dict(KEY)).save()
    code = (
        "import sys; from alora_kernels.kernels import tuned; from tests.tuning.fakes import KEY\n"
        "for _ in range(300): assert tuned.read(KEY).table is not None, tuned.read(KEY)"
    )
    reader = subprocess.Popen([sys.executable, "-c", code])
    while reader.poll() is None:
        Table(dict(KEY), verdicts={str(i): OK for i in range(200)}).save()
    assert reader.returncode == 0
    assert [path.name for path in cache.iterdir()] == ["tuned-fake-9000.json"]


def test_what_is_no_gpu_has_no_table(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for device in (CPU, torch.device("meta")):
            assert tuned.find(device).table is None
    assert not caplog.records


def test_import_reads_nothing(cache: Path) -> None:
    cache.mkdir()
    tuned.path_of(KEY).write_text("{")
    code = (
        "import alora_kernels.files as files\n"
        "files.cache_dir = lambda: 1 / 0\n"
        "import alora_kernels.kernels, alora_kernels.ops, alora_kernels.tuning.run"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
