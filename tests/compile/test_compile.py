"""Every kernel variant compiles, spills nothing, keeps the rules, can be launched and multiplies on tensor cores.

Hopper whole, and of one chip of each other kind the kernels that have spilled or have tiles of their own there. All
kernels of all chips are `make static`, which also asks the oldest Triton that the package takes.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from filelock import FileLock

from .process import ROOT, compiling

# some 400 variants, half a second each on one core
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHIPS = ("sm_90",)
OTHERS = {
    "sm_80": ("da", "expand_backward", "gate_backward", "shrink_soft"),
    "sm_100": ("da", "gate_backward", "one_pass_soft", "shrink_soft"),
    "sm_120": ("da", "expand_backward", "shrink_soft"),
    "gfx942": ("expand", "shrink_soft", "shrink_task"),
}
SOURCES = sorted((ROOT / "alora_kernels/kernels").glob("*.py"))
KERNELS = {name for file in SOURCES for name in re.findall(r"^def _?(\w+)_kernel\(", file.read_text(), re.MULTILINE)}
GEMMS = ("expand", "dx_soft", "dx_task", "one_pass_soft", "one_pass_task")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The report of `bench static`; workers of one run share it, for it takes minutes."""
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "static.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            found: Rows = []
            for chips, kernels in ((CHIPS, ()), *(((chip,), kernels) for chip, kernels in OTHERS.items())):
                wanted = [f"--chip={chip}" for chip in chips] + [f"--kernel={kernel}" for kernel in kernels]
                part = file.with_suffix(".part")
                compiling("-m", "bench", "static", *wanted, "--json", str(part))
                found += json.loads(part.read_text())["compiled"]
            file.write_text(json.dumps(found))
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.fixture(params=[*CHIPS, *OTHERS])
def of_chip(rows: Rows, request: pytest.FixtureRequest) -> Rows:
    return [row for row in rows if row["chip"] == request.param]


def test_every_kernel_is_covered(of_chip: Rows) -> None:
    assert {row["kernel"] for row in of_chip} == set(OTHERS.get(of_chip[0]["chip"], KERNELS))


def test_everything_compiles(of_chip: Rows) -> None:
    assert [(row["kernel"], row["variant"], row["error"]) for row in of_chip if row["error"]] == []


def test_nothing_spills(of_chip: Rows) -> None:
    assert [(row["kernel"], row["variant"], row["spilled"]) for row in of_chip if row["spilled"]] == []


def test_nothing_races(of_chip: Rows) -> None:
    """Flags, what they stand for, and operands in registers: the rules of `bench.static.ptx`."""
    assert [(row["kernel"], row["variant"], row["hazards"]) for row in of_chip if row["hazards"]] == []


def test_shared_memory_fits(of_chip: Rows) -> None:
    assert [row for row in of_chip if row["shared"] > row["shared_limit"]] == []


def test_everything_can_be_launched(of_chip: Rows) -> None:
    assert [(row["kernel"], row["variant"], row["limit"]) for row in of_chip if row["programs"] < 1] == []


def test_hopper_multiplies_in_warpgroups(rows: Rows) -> None:
    """A tile of 64 rows or more in 16 bits must become wgmma, which takes its operands from shared memory."""
    wide = [
        row
        for row in rows
        if row["chip"] == "sm_90" and row["kernel"] in GEMMS and row["blocks"]["M"] >= 64
        if row["dtypes"].startswith(("bf16", "fp16"))
    ]
    assert {row["kernel"] for row in wide} == set(GEMMS)
    assert [(row["kernel"], row["variant"], row["tensor"]) for row in wide if not row["tensor"].get("HGMMA")] == []
