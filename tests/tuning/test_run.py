"""The run: order, budget, resumption, Ctrl-C, memory, a lost device, tiles. Nothing is measured."""

from __future__ import annotations

import json
from threading import Event
from typing import Any

import pytest
import torch

from alora_kernels.kernels import tuned
from alora_kernels.kernels.tiles import Tile
from alora_kernels.kernels.tuned import OK, Table
from alora_kernels.ops.dispatch import PLANS, BackendError, Plan
from alora_kernels.tuning import run
from alora_kernels.tuning.run import DeviceLostError, Tuner

from . import fakes
from .fakes import KEY, FakeLayer, device, tuner


@pytest.fixture(autouse=True)
def fake_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Layer", FakeLayer)
    monkeypatch.setattr(FakeLayer, "faults", {})
    monkeypatch.setattr(FakeLayer, "races", {})
    monkeypatch.setattr(FakeLayer, "asked", [])


def kept() -> Table:
    """What is on disk."""
    found = tuned.read(KEY).table
    assert found is not None
    return found


def ideas(tuner: Tuner) -> list[str]:
    return list(tuner._open())


def test_a_whole_run() -> None:
    one = tuner(machine=device(lambda name: 0.5 if name == "one_pass" else 1.0))
    assert one.run() == 0 and not ideas(one) and not one.skipped
    table = kept()
    assert set(table.verdicts.values()) == {OK} and len(table.verdicts) == 2 * len(PLANS)
    assert set(table.plans) == {f"{r}/2/{s.name}" for r in run.ROUTINGS for s in fakes.SHAPES}
    assert table.plans["task/2/long square"]["plan"][0] == "one_pass"
    assert table.plans["task/2/long square"]["ms"]["base_first"] == 1000
    assert set(table.tiles) == {"gemm_descriptor/2/long square", "one_pass_task/2/long square",
                                "one_pass_soft/2/long square", "shrink_task/2/", "shrink_soft/2/",
                                "expand_backward/2/", "da/2/", "decode/2/"}  # fmt: skip
    assert table.trying == "" and table.date


def test_a_wrong_plan_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLayer, "faults", {"task/one_pass": "y is off"})
    monkeypatch.setattr(FakeLayer, "races", {"task/base_first+overlap": "differed"})
    timed: list[Any] = []
    tuner(machine=device(lambda name: float(timed.append(name) or 1))).run()
    table = kept()
    assert table.verdicts["task/one_pass"] == "y is off" and table.verdicts["task/base_first+overlap"] == "differed"
    assert "one_pass" not in table.plans["task/2/long square"]["ms"]
    assert "one_pass" in table.plans["soft/2/long square"]["ms"]


def test_a_plan_that_nothing_takes() -> None:
    refusal = BackendError("no")
    FakeLayer.faults = {"task/one_pass": refusal}
    FakeLayer.races = {"task/one_pass": refusal}
    tuner().run()
    assert kept().verdicts["task/one_pass"] == run.UNTAKEN


def test_where_every_plan_is_wrong_none_is_chosen() -> None:
    FakeLayer.faults = {f"{r}/{p}": "wrong" for r in run.ROUTINGS for p in PLANS}
    assert tuner().run() == 0
    assert {entry["plan"] for entry in kept().plans.values()} == {None}


def test_the_budget_ends_a_run_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[str] = []
    qualify = Tuner._qualify

    def spy(self: Tuner, name: str, *args: str) -> None:
        proven.append(name)
        qualify(self, name, *args)

    monkeypatch.setattr(Tuner, "_qualify", spy)
    clock = iter(range(1000))
    left = tuner(machine=device(now=lambda: next(clock)), deadline=5).run()
    before = kept()
    assert len(before.verdicts) == 5 and left == len(ideas(tuner(before))) > 20
    assert tuner(before).run() == 0
    assert len(proven) == len(set(proven)) == 2 * len(PLANS)


def test_a_finished_table_asks_for_nothing() -> None:
    tuner().run()
    FakeLayer.asked.clear()
    heard: list[str] = []
    assert tuner(kept(), tell=lambda idea, left: heard.append(idea)).run() == 0
    assert not heard and not FakeLayer.asked
    other = tuner(kept(), tasks=64)
    assert all("square" in name for name in ideas(other))  # plans depend on how many tasks there are


def test_what_was_measured_before_ctrl_c_stays() -> None:
    FakeLayer.faults = {"task/low_rank_first": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        tuner().run()
    table = kept()
    assert 0 < len(table.verdicts) < len(PLANS) and "task/low_rank_first" not in table.verdicts
    assert table.trying == ""
    FakeLayer.faults = {}
    assert tuner(table).run() == 0


def test_a_run_that_never_came_back_names_its_culprit() -> None:
    seen: list[str] = []

    def looks() -> str:
        seen.append(json.loads(tuned.path_of(KEY).read_text())["trying"])
        return ""

    FakeLayer.faults = {"task/one_pass": looks}
    tuner().run()
    assert seen[0] == "task/one_pass"
    tuner(Table(dict(KEY), trying="task/one_pass")).run()
    assert "did not come back" in kept().verdicts["task/one_pass"]


@pytest.mark.parametrize("where", ["faults", "seconds"])
def test_out_of_memory_skips_the_row(where: str) -> None:
    def seconds(name: Any) -> float:
        if where == "seconds":
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    if where == "faults":
        FakeLayer.faults = {"task/one_pass": torch.OutOfMemoryError("no memory")}
    one = tuner(machine=device(seconds))
    assert one.run() == 0
    assert one.skipped and set(one.skipped.values()) == {"out of memory"}
    if where == "faults":
        assert "task/one_pass" in one.skipped and "task/one_pass" not in kept().verdicts
        assert kept().verdicts["soft/one_pass"] == OK and kept().plans
    else:
        assert not kept().plans and len(kept().verdicts) == 2 * len(PLANS)


def test_a_judgement_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PATIENCE", 0.05)
    hung = Event()
    said: list[str] = []

    def give_up(name: str) -> None:
        said.append(name)
        hung.set()

    FakeLayer.faults = {"task/one_pass": lambda: "" if hung.wait(20) else "nobody looked"}
    tuner(machine=device(hung=give_up)).run()
    assert said[0] == "task/one_pass" and kept().verdicts["task/one_pass"] == OK


def test_an_error_in_a_plan_is_its_verdict() -> None:
    FakeLayer.faults = {"task/one_pass": ValueError("shared memory\nis short")}
    assert tuner().run() == 0
    assert kept().verdicts["task/one_pass"] == "ValueError: shared memory is short"


@pytest.mark.parametrize("where", ["faults", "ready", "seconds"])
def test_a_lost_device_ends_the_run_and_is_not_met_twice(where: str) -> None:
    sticky = RuntimeError("CUDA error: an illegal memory access was encountered")
    lost = []

    def alive() -> None:
        if lost:
            raise sticky

    def fail(*_: Any) -> Any:
        lost.append(1)
        raise sticky

    if where == "faults":
        FakeLayer.faults = {"task/one_pass": fail}
    machine = (
        device(alive=alive)
        if where == "faults"
        else device(alive=alive, **{where: fail})
        if where == "ready"
        else device(fail, alive=alive)
    )
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        tuner(machine=machine).run()
    table, FakeLayer.faults = kept(), {}
    assert any("illegal memory" in said for said in table.verdicts.values())
    lost.clear()
    next_one = tuner(table)
    assert next_one.run() == 0
    if where == "faults":
        assert "illegal memory" in table.verdicts["task/one_pass"]
        assert "one_pass" not in table.plans["task/2/long square"]["ms"]


def test_a_folder_that_cannot_be_written_is_met_before_anything_is_measured(cache: Any) -> None:
    cache.write_text("a file")
    with pytest.raises(FileExistsError):
        tuner().run()
    assert not FakeLayer.asked


def test_tiles_of_the_chip_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without a tile on a chip is no idea; one of whose tiles none runs keeps the rule's."""
    monkeypatch.setattr(run, "has_tile", lambda kernel, *_: not kernel.startswith(("one_pass", "gemm_descriptor")))
    one = tuner()
    assert {name.split("/")[0] for name in ideas(one) if name.count("/") == 2} >= {"gemm", "decode", "da"}
    assert not any(name.startswith(("one_pass", "gemm_descriptor")) for name in ideas(one))
    FakeLayer.faults = {"task/two_launch": "wrong", "soft/two_launch": "wrong"}
    assert one.run() == 0
    assert kept().tiles["da/2/"] is None and kept().tiles["gemm/2/long square"] is None


def test_a_better_tile_is_kept_and_its_plans_are_timed_again() -> None:
    used = run.tile_for("da", fakes.CPU, torch.float16)
    better = run.neighbours(used, "da", 10**6)[1]
    heard: list[str] = []
    tuner(machine=device(lambda name: 0.5 if name == better else 1.0), tell=lambda idea, left: heard.append(idea)).run()
    table = kept()
    assert table.tiles["da/2/"] == list(run.astuple(better))
    assert heard.count("task/2/long square") == 2
    assert not any("stale" in entry for entry in table.plans.values())


def test_a_tile_of_waiting_programs_must_stand_the_races() -> None:
    used = run.tile_for("one_pass_task", fakes.CPU, torch.float16)
    first, second = run.neighbours(used, "one_pass_task", 10**6)[1:3]
    told: list[int] = []

    def raced() -> str:
        told.append(1)
        return "differed" if len(told) > 5 else ""  # plans pass, the first tile fails

    FakeLayer.races = {"task/one_pass": raced}
    run_ = tuner(machine=device(lambda name: {first: 0.4, second: 0.5}.get(name, 1.0)))
    run_.run()
    table = kept()
    assert table.tiles["one_pass_task/2/long square"] == list(run.astuple(used))
    assert table.verdicts[f"tile one_pass_task {run.astuple(first)}"] == "differed"


@pytest.mark.parametrize("kernel", run.KERNELS)
@pytest.mark.parametrize("tile", [Tile(128, 256, 64, 8, 3, 2), Tile(64, 32, 128, 4, 3), Tile(64, 256, 0, 8, 3)])
def test_neighbours(kernel: str, tile: Tile) -> None:
    found = run.neighbours(tile, kernel, 232_448)
    assert found[0] == tile and len(set(found)) == len(found) > 1
    for other in found[1:]:
        assert 2 * (other.block_m + other.block_n) * other.block_k * other.num_stages <= 232_448
        assert other.num_stages > 0 and other.num_warps in (4, 8) and other.parts in (1, 2)


def test_what_is_in_use_stays_unless_clearly_beaten() -> None:
    assert run.pick({"old": 1.005, "new": 1.0}, "old") == "old"
    assert run.pick({"old": 1.02, "new": 1.0}, "old") == "new"
    assert run.pick({"new": 3.0, "other": 2.0}, "old") == "other"  # the old one failed
    assert run.pick({}, "old") is None


def test_a_plan_takes_each_part_from_where_it_is_fastest() -> None:
    forward = {"one_pass": 1.0, "two_launch": 1.2, "low_rank_first": 1.5}
    both = {"one_pass": 4.0, "two_launch": 4.2, "low_rank_first": 4.0}  # backward alone: 3.0, 3.0, 2.5
    assert run.pick_plan(forward, both) == Plan("one_pass", "low_rank_first")
    assert run.pick_plan(forward, {}) == Plan("one_pass", "fused")
    assert run.pick_plan({}, {}) is None
    forward["base_first+overlap"], both["base_first+overlap"] = 1.1, 3.0
    assert run.pick_plan(forward, both) == Plan("base_first", "low_rank_first", True)
    assert run.pick_plan({"base_first": 1.0, "base_first+overlap": 0.9}, {}) == PLANS["base_first+overlap"]


def test_shapes_of_a_model() -> None:
    found = run.shapes_of([(64, 64), (64, 256), (64, 64), (256, 64)])
    assert found[0].name in ("long 64x256", "long 256x64") and len(found) == 9
    assert {shape.group for shape in found} >= {"long square", "decode wide", "short tall"}
