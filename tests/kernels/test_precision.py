"""TF32 products of float32 where the user allowed them, by whichever of torch's ways, mixed ones too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from alora_kernels import alora_linear
from alora_kernels import kernels as ak
from alora_kernels.kernels.numerics import dot_precision
from tests.compare import assert_as_good_as_torch, problem, skip_unless_runnable

CPU, MATMUL = torch.device("cpu"), torch.backends.cuda.matmul
ONE, ALL = "matmul", "everything"


def new(scope: str, value: str) -> Callable[[], None]:
    target = MATMUL if scope == ONE else torch.backends
    return lambda: setattr(target, "fp32_precision", value)


def old(value: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(value)


def flag(value: bool) -> Callable[[], None]:
    return lambda: setattr(MATMUL, "allow_tf32", value)


WAYS = {
    "nothing set": ([], "ieee"),
    "old": ([old("high")], "tf32"),
    "old, least": ([old("medium")], "tf32"),
    "old flag": ([flag(True)], "tf32"),
    "new, matmul": ([new(ONE, "tf32")], "tf32"),
    "new, everything as Trainer does": ([new(ALL, "tf32")], "tf32"),
    "new, all but matmul": ([new(ALL, "tf32"), new(ONE, "ieee")], "ieee"),
    "new, matmul alone": ([new(ALL, "ieee"), new(ONE, "tf32")], "tf32"),
    "new then old": ([new(ALL, "tf32"), old("highest")], "ieee"),
    "new then old flag": ([new(ONE, "tf32"), flag(False)], "ieee"),
    "old then new": ([old("high"), new(ONE, "ieee")], "ieee"),
    "refused, then old": ([new(ALL, "ieee"), old("high")], "tf32"),
    "bf16 for CPUs": ([new(ALL, "bf16")], "ieee"),
}


def reset() -> None:
    """As a new process: torch's older ways set two of the newer ones, which then overrule a setting for everything."""
    torch.backends.fp32_precision = "none"
    MATMUL.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert dot_precision(torch.float32, CPU) == "ieee"


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    reset()
    yield
    reset()


@pytest.mark.parametrize("way", WAYS)
def test_the_setting_is_read_whoever_made_it(way: str) -> None:
    steps, want = WAYS[way]
    for step in steps:
        step()
    assert dot_precision(torch.float32, CPU) == want
    assert {dot_precision(dtype, CPU) for dtype in (torch.float64, torch.float16, torch.bfloat16)} == {"ieee"}


@pytest.mark.parametrize("chip", ["sm_80", "sm_120", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_chips_without_tf32_take_three_bf16_products(chip: str) -> None:
    torch.set_float32_matmul_precision("high")
    with ak.recording(chip):
        got = dot_precision(torch.float32, torch.device("meta"))
    assert got == ("bf16x3" if chip in ("gfx950", "gfx1100", "gfx1201") else "tf32")


@pytest.mark.parametrize("routing", ["task", "soft"])
def test_a_float32_layer_trains_after_the_trainer_allowed_tf32(routing: str) -> None:
    skip_unless_runnable("triton", "cpu", torch.float32)
    torch.backends.fp32_precision = "tf32"  # what TrainingArguments(tf32=True) does
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    p = problem((9,), 12, 10, 4, 3, routing=routing, dtype=torch.float32)
    assert_as_good_as_torch(p, alora_linear, torch.float32, backend="triton")
