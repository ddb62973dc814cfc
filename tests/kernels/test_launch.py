"""Launching: recordings on meta tensors, launch counts, repeatability, tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from alora_kernels import kernels as ak
from alora_kernels.kernels import tiles
from alora_kernels.kernels.decode import takes_decode
from alora_kernels.kernels.gemm import describe
from alora_kernels.kernels.numerics import cdiv, next_power_of_2
from alora_kernels.kernels.sync import orders_stores
from alora_kernels.kernels.tiles import chip_of, tile_for
from alora_kernels.routing import RowGroups

from .cases import DEVICE, Case, Layer, meta

META = torch.device("meta")


def meta_layer(e: int = 8, r: int = 16) -> dict[str, torch.Tensor]:
    shapes = {"x": (512, 256), "w": (384, 256), "a": (e, r, 256), "b": (384, r), "router": (e, 256)}
    return {name: meta(*shape) for name, shape in shapes.items()}


def test_meta_tensors_are_recorded_not_run() -> None:
    t = meta_layer()
    ids = meta(512, dtype=torch.int32)
    groups = RowGroups(ids, ids, meta(9, dtype=torch.int32))
    with ak.recording("sm_90") as launches:
        h = ak.shrink_task(t["x"], t["a"], groups, scaling=1.0)
        y = ak.expand(t["x"], t["w"], None, h, t["b"])
    assert (h.shape, y.shape) == ((512, 16), (512, 384))
    assert len(launches) == 2
    assert launches[1].meta["BLOCK_N"] in (128, 256)
    ak.expand(t["x"], t["w"], None, h, t["b"])
    assert len(launches) == 2


def pair(t: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = meta(512, dtype=torch.int32)
    h = ak.shrink_task(t["x"], t["a"], RowGroups(ids, ids, meta(9, dtype=torch.int32)), scaling=1.0)
    return ak.expand(t["x"], t["w"], None, h, t["b"])


def test_launches_overlap_from_the_second_on() -> None:
    with ak.recording("sm_90") as launches:
        with ak.overlapping():
            pair(meta_layer())
            assert not launches
        pair(meta_layer())
    flags = [(one.meta.get("PDL", False), one.meta.get("launch_pdl", False)) for one in launches]
    assert flags == [(True, False), (True, True), (False, False), (False, False)]


def test_the_first_launch_that_is_made_waits_for_all_before_it() -> None:
    """A shrink of no rank is not launched: whatever comes before may still write x."""
    with ak.recording("sm_90") as launches, ak.overlapping():
        pair(meta_layer(r=0))
    assert [(one.kernel.__name__, "launch_pdl" in one.meta) for one in launches] == [("_expand_kernel", False)]


def test_after_an_error_nothing_is_launched() -> None:
    with ak.recording("sm_90") as launches:
        with pytest.raises(KeyError), ak.overlapping():
            pair(meta_layer())
            raise KeyError
        pair(meta_layer())
    assert len(launches) == 2


@pytest.mark.parametrize("chip", ["sm_80", "sm_89", "sm_90", "sm_103", "sm_120", "gfx942", "interpreter"])
def test_chips_on_which_launches_overlap(chip: str) -> None:
    with ak.recording(chip):
        assert ak.overlaps_launches(META) == (chip in ("sm_90", "sm_103", "sm_120", "interpreter"))


def test_soft_routing_takes_one_launch_whatever_the_experts() -> None:
    for e in (1, 8, 64):
        t = meta_layer(e)
        with ak.recording("sm_80") as launches:
            ak.shrink_soft(t["x"], t["a"], t["router"], scaling=1.0)
        assert len(launches) == 1


def test_recordings_nest_and_name_the_chip() -> None:
    with ak.recording("sm_80"):
        with ak.recording("gfx942"):
            assert chip_of(META) == "gfx942"
        assert chip_of(META) == "sm_80"


@pytest.mark.parametrize(("chip", "trusted"), [("sm_90", True), ("gfx942", False), ("gfx1100", False)])
def test_kernels_that_raise_flags_are_not_for_amd(chip: str, trusted: bool) -> None:
    x, a = torch.empty(16, 64, device="meta"), torch.empty(2, 8, 64, device="meta")
    with ak.recording(chip):
        assert takes_decode(x, a) == orders_stores(META) == trusted


def test_tiles_are_frozen_and_unknown_chips_get_small_ones() -> None:
    tile = tile_for("gemm", torch.device(DEVICE), torch.float32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tile.block_m = 1  # type: ignore[misc]
    with ak.recording("sm_999"):
        unknown = tile_for("gemm", META, torch.float16)
    with ak.recording("gfx942"):
        assert tile_for("gemm", META, torch.float16) == unknown


@pytest.mark.parametrize("case", [Case(p=0.25), Case(m=64, e=17, r=16)], ids=str)
def test_repeats_are_bit_identical(case: Case) -> None:
    t = Layer(case, torch.float32)

    def run() -> list[torch.Tensor]:
        h, p = ak.shrink_soft(t.x, t.a, t.router, scaling=0.3, dropout=t.drop)
        dh, db = ak.expand_backward(t.dy, t.b, h, scaling=0.3)
        dp = ak.gate_backward(dh, p, case.e, dtype=torch.float32)
        return [
            *(h, p, dh, db, dp),
            ak.shrink_task(t.x, t.a, t.groups, scaling=0.3, dropout=t.drop),
            ak.expand(t.x, t.w, t.bias, h, t.b),
            ak.dx_task(t.dy, t.w, dh, t.a, t.groups, dtype=torch.float32, dropout=t.drop),
            ak.dx_soft(t.dy, t.w, dp, t.a, t.router, dtype=torch.float32, dropout=t.drop),
            ak.da_task(dh, t.x, t.groups, case.e, dropout=t.drop, dtype=torch.float32),
            *ak.da_soft(dp, t.x, case.e, dropout=t.drop, dtype=torch.float32),
        ]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_many_absent_tasks() -> None:
    t = Layer(Case(m=20, e=40, r=2, ids="equal"), torch.float32)
    h = ak.shrink_task(t.x, t.a, t.groups, scaling=1.0)
    torch.testing.assert_close(h, t.x @ t.a[-1].T)
    da = ak.da_task(t.dh, t.x, t.groups, 40, dtype=torch.float32)
    assert not da[:-1].any()


# Which loops must not be pipelined under dropout, by chip and version: those of x times A, and of x times A and more.
RACES = [("sm_90", (3, 6), (True, True)), ("sm_90", (3, 9), (False, True)), ("sm_80", (3, 6), (False, False))]


@pytest.mark.parametrize(("chip", "version", "races"), RACES)
def test_a_masked_operand_in_registers_is_not_overwritten(
    chip: str, version: tuple[int, int], races: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hopper's products read it while the loop goes on (triton issue 9433); compilers before 3.7 forget that."""
    monkeypatch.setattr(tiles, "TRITON", version)
    t, ids = meta_layer(), meta(512, dtype=torch.int32)
    groups = RowGroups(ids, ids, meta(9, dtype=torch.int32))
    alone, beside = races
    for drop in (None, ak.Dropout(0.1, meta(1, dtype=torch.int64))):
        with ak.recording(chip) as launches:
            ak.shrink_task(t["x"], t["a"], groups, scaling=1.0, dropout=drop)
            ak.da_task(meta(512, 16), t["x"], groups, 8, dropout=drop, dtype=torch.bfloat16)
            ak.shrink_soft(t["x"], t["a"], t["router"], scaling=1.0, dropout=drop)
            if chip == "sm_90":
                ak.one_pass_task(t["x"], t["w"], None, t["a"], t["b"], ids, scaling=1.0, dropout=drop)
                ak.one_pass_soft(t["x"], t["w"], None, t["a"], t["b"], t["router"], scaling=1.0, dropout=drop)
        over_x = [launch for launch in launches if "STAGES" in launch.meta]
        for launch, raced in zip(over_x, (alone, alone, beside, beside, beside)):
            stages = launch.meta["STAGES"]
            assert stages == 1 if raced and drop else stages == launch.meta["num_stages"] > 1


def test_a_descriptor_is_what_its_constructor_makes() -> None:
    matrix = torch.zeros(32, 48, dtype=torch.float16)[:, :32]
    ours, theirs = describe(matrix, (16, 32)), TensorDescriptor(matrix, [32, 32], [48, 1], [16, 32])
    assert ours.base is matrix
    for name in (field.name for field in dataclasses.fields(theirs) if field.name != "base"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 16, 17, 1023, 1024])
def test_sizes_are_rounded_as_by_triton(n: int) -> None:
    assert next_power_of_2(n) == max(triton.next_power_of_2(n), 1)
    assert cdiv(n, 16) == triton.cdiv(n, 16)
