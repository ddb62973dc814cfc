"""The rules of `bench.static.ptx`: kernels keep them, and a kernel that breaks one is found."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from bench.static.ptx import hazards

from .process import ROOT, compiling

SCRIPT = "from tests.compile.ptx_samples import report; report()"
OLD = Path(os.environ.get("ALORA_OLD_TRITON", ROOT / ".venv-triton36")) / "bin" / "python"
ONE_LAUNCH = ("one_pass_task", "one_pass_soft", "decode")
slow = pytest.mark.slow


@pytest.fixture(scope="module", params=["this Triton", "Triton 3.6"])
def ptx(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "this Triton":
        return json.loads(compiling("-c", SCRIPT))
    if not OLD.exists():
        pytest.skip(f"no {OLD}: `make static` makes it, ALORA_OLD_TRITON names another")
    return json.loads(compiling("-c", SCRIPT, python=str(OLD)))


def changed(text: str, pattern: str, new: str) -> str:
    result, times = re.subn(pattern, new, text)
    assert times, f"nothing to mutate: {pattern}"
    return result


@slow
@pytest.mark.parametrize("kernel", [*ONE_LAUNCH, "shrink_soft"])
def test_kernels_keep_the_rules(ptx: dict[str, str], kernel: str) -> None:
    assert hazards(ptx[kernel]) == []


@slow
@pytest.mark.parametrize("kernel", ONE_LAUNCH)
def test_a_release_without_a_barrier_is_found(ptx: dict[str, str], kernel: str) -> None:
    assert any("no barrier" in h or "between" in h for h in hazards(changed(ptx[kernel], r"bar\.sync[^;]*;", "")))


@slow
@pytest.mark.parametrize("kernel", ONE_LAUNCH)
def test_a_store_after_the_barrier_is_found(ptx: dict[str, str], kernel: str) -> None:
    late = changed(ptx[kernel], r"(bar\.sync[^;]*;)", r"\1\n\tst.global.b32 [%rd1], %r1;")
    assert any("store between barrier and release" in h for h in hazards(late))


@slow
@pytest.mark.parametrize("kernel", ONE_LAUNCH)
def test_a_read_without_an_acquire_is_found(ptx: dict[str, str], kernel: str) -> None:
    found = hazards(changed(ptx[kernel], r"gpu\.acquire", "gpu.relaxed"))
    assert any("before an acquire" in h for h in found)


@slow
@pytest.mark.parametrize("kernel", ONE_LAUNCH)
@pytest.mark.parametrize("load", ["ld.global.nc", "cp.async.ca.shared.global"])
def test_a_read_that_may_be_stale_is_found(ptx: dict[str, str], kernel: str, load: str) -> None:
    assert any("past the acquire" in h for h in hazards(changed(ptx[kernel], r"ld\.global(?=\.[bv]\d)", load)))


@slow
def test_a_pipelined_loop_with_a_masked_operand_is_found(ptx: dict[str, str]) -> None:
    """What `kernels.tiles.stages_for` is there for: three stages overwrite a register that a product still reads."""
    assert any("product in flight" in h for h in hazards(ptx["pipelined"]))
    assert hazards(changed(ptx["pipelined"], r"(wgmma\.wait_group\.sync\.aligned) \d", r"\1 0")) == []


LOOP = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 p0) {
$L__1:
  mov.b32 %r5, %r6;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2}, {%r5}, %rd1, 1, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned WAIT;
  @%p1 bra $L__1;
  ret;
}
"""


@pytest.mark.parametrize(("wait", "broken"), [(0, False), (1, True)])
def test_a_loop_that_waits_too_late(wait: int, broken: bool) -> None:
    assert bool(hazards(LOOP.replace("WAIT", str(wait)))) == broken


def test_an_operand_in_shared_memory_may_stay_in_flight() -> None:
    assert hazards(LOOP.replace("WAIT", "1").replace("{%r5}", "%rd5")) == []
