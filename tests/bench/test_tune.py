"""`bench tune`: what it chooses, what it writes, and that a candidate really is what runs. Measuring needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton", reason="tiles are Triton's")

from alora_kernels import kernels as ak
from alora_kernels.kernels.tiles import Tile, override_tiles
from alora_kernels.ops.dispatch import PLANS, Plan
from bench.__main__ import app
from bench.layers import candidates, tune


def test_what_is_in_use_stays_unless_clearly_beaten() -> None:
    assert tune.pick({"old": 1.005, "new": 1.0}, "old") == "old"
    assert tune.pick({"old": 1.02, "new": 1.0}, "old") == "new"
    assert tune.pick({"new": 3.0, "other": 2.0}, "old") == "other"  # the old one failed


def test_a_plan_takes_each_part_from_where_it_is_fastest() -> None:
    forward = {"one_pass": 1.0, "two_launch": 1.2, "low_rank_first": 1.5}
    both = {"one_pass": 4.0, "two_launch": 4.2, "low_rank_first": 4.0}  # backward alone: 3.0, 3.0, 2.5
    assert tune.pick_plan(forward, both) == Plan("one_pass", "low_rank_first")
    assert tune.pick_plan(forward, {}) == Plan("one_pass", "fused")
    forward["base_first+overlap"], both["base_first+overlap"] = 1.1, 3.0
    assert tune.pick_plan(forward, both) == Plan("one_pass", "low_rank_first", True)


def test_the_table_is_python_and_says_where_it_is_from() -> None:
    plans: tune.Plans = {("sm_90", "task", 2, "long square"): ("one_pass", "fused", False)}
    tiles: tune.Tiles = {("decode", "sm_90", 2, ""): (64, 16, 128, 4, 4, 1)}
    text = tune.render("NVIDIA X, commit abc", plans, tiles)
    found: dict[str, Any] = {}
    exec(text, found)
    assert (found["PLANS"], found["TILES"], found["MEASURED"]) == (plans, tiles, "NVIDIA X, commit abc")
    assert Tile(*found["TILES"]["decode", "sm_90", 2, ""]).block_n == 16
    exec(tune.render("", {}, {}), found)
    assert found["PLANS"] == found["TILES"] == {}


@pytest.mark.parametrize("kernel", candidates.TILES)
def test_a_candidate_is_what_runs(kernel: str) -> None:
    for shapes in candidates.classes(kernel):
        for tile in candidates.TILES[kernel]:
            with ak.recording("sm_90") as launches, override_tiles({kernel: tile}):
                candidates.trial(kernel, shapes, "meta").run()
            meta = launches[0].meta  # sums over planes may follow
            assert (meta["num_warps"], meta["num_stages"]) == (tile.num_warps, tile.num_stages)
            assert [launch.kernel.__name__ for launch in launches[1:]] in ([], ["_sum_partials_kernel"])


def test_the_first_candidate_is_the_one_in_use() -> None:
    for kernel, tiles in candidates.TILES.items():
        with ak.recording("sm_90") as usual:
            candidates.trial(kernel, candidates.classes(kernel)[0], "meta").run()
        with ak.recording("sm_90") as first, override_tiles({kernel: tiles[0]}):
            candidates.trial(kernel, candidates.classes(kernel)[0], "meta").run()
        assert usual[0].meta == first[0].meta, kernel
        assert len(set(tiles)) == len(tiles)


def test_without_a_gpu_it_says_what_works(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / "t.py")])
    assert result.exit_code == 1 and "--check sm_90" in result.output
    assert not (tmp_path / "t.py").exists()


@pytest.mark.parametrize(("wish", "listed"), [(["--check", "sm_1"], "sm_90"), (["--kernel", "x"], "one_pass_task")])
def test_unknown_names_list_the_known_ones(wish: list[str], listed: str) -> None:
    result = CliRunner().invoke(app, ["tune", *wish], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and listed in result.output


def test_every_plan_can_be_measured() -> None:
    from bench.layers.providers import find

    assert {p.name for p in find([f"fused:{name}" for name in PLANS])} == {f"fused:{name}" for name in PLANS}
