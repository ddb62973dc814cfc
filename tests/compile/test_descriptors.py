"""Host-side tensor descriptors compile ahead of time, for chips of each kind; no GPU needed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .descriptor_kernel import NAMES
from .process import compiling

pytestmark = pytest.mark.slow

SCRIPT = "from tests.compile.descriptor_kernel import report; report()"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads(compiling("-c", SCRIPT))


@pytest.mark.parametrize("chip", NAMES)
def test_a_descriptor_is_a_type_with_its_block_shape(found: dict[str, Any], chip: str) -> None:
    first, second = (dict(job["signature"]) for job in found[chip]["jobs"])
    assert [first[name] for name in "xwy"] == ["tensordesc<bf16[128, 64]>"] * 2 + ["tensordesc<bf16[128, 128]>"]
    assert [second[name] for name in "xwy"] == ["tensordesc<bf16[128, 32]>"] * 2 + ["tensordesc<bf16[128, 128]>"]


@pytest.mark.parametrize("chip", NAMES)
def test_other_arguments_are_specialised_as_at_a_launch(found: dict[str, Any], chip: str) -> None:
    first, second = found[chip]["jobs"]
    assert dict(first["signature"])["bias_ptr"] == "*fp32"
    assert dict(second["signature"])["bias_ptr"] == "constexpr" and ["bias_ptr", None] in second["constexprs"]
    aligned = dict(first["attributes"])
    assert set(aligned) == {3, 4} and "D" in aligned[3] and aligned[4] == "D"  # 512 is a multiple of 16
    assert second["attributes"] == []  # 1000 is not


@pytest.mark.parametrize("chip", NAMES)
def test_descriptors_compile(found: dict[str, Any], chip: str) -> None:
    for row in found[chip]["rows"]:
        assert row["error"] == "" and row["programs"] >= 1 and row["dtypes"].startswith("bf16")
        # chips with a copy engine fetch and store whole tiles, the others copy element by element
        assert (row["bulk"] > 0) == (chip in ("sm_90", "sm_100"))
        kind = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[chip]
        assert any(name.startswith(kind) and times > 0 for name, times in row["tensor"].items())


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_counts_of_a_batch_are_the_counts_one_by_one(found: dict[str, Any], chip: str) -> None:
    together = [{name: row[name] for name in ("tensor", "bulk", "copies", "atomics")} for row in found[chip]["rows"]]
    assert together == found[chip]["alone"]
    assert together[0] != together[1]  # or the address ranges would not be tested
