"""Bad input to the public ops: each error names the argument, what it is and what it should be."""

from __future__ import annotations

import re

import pytest
import torch

from alora_kernels import alora_linear
from alora_kernels.ops import trusted_alora

M, K, N, R, E = 4, 6, 5, 2, 3


def call(layer=alora_linear, **changes):
    given = {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "lora_A": torch.randn(E, R, K),
        "lora_B": torch.randn(N, R),
        "task_ids": torch.zeros(M, dtype=torch.long),
    }
    given.update(changes)
    return layer(**given)


CASES = {
    "x of another K": ({"x": torch.randn(M, K + 1)}, ValueError, "lora_A has in_features=6 but x has 7"),
    "weight of another K": ({"weight": torch.randn(N, 9)}, ValueError, "weight has in_features=9 but x has 6"),
    "B of another N": ({"lora_B": torch.randn(9, R)}, ValueError, "lora_B has out_features=9 but weight has 5"),
    "B of another R": ({"lora_B": torch.randn(N, 9)}, ValueError, "lora_B has rank 9 but lora_A has rank 2"),
    "A without experts": ({"lora_A": torch.randn(R, K)}, ValueError, "lora_A must be [experts, rank, in_features]"),
    "no experts": ({"lora_A": torch.randn(0, R, K)}, ValueError, "at least one expert"),
    "router of another E": (
        {"router": torch.randn(9, K), "task_ids": None}, ValueError, "router must be [experts, in_features] = (3, 6)",
    ),
    "bias of another N": ({"bias": torch.randn(9)}, ValueError, "bias must be [5], got (9,)"),
    "both routings": ({"router": torch.randn(E, K)}, ValueError, "exactly one of router"),
    "no routing": ({"task_ids": None}, ValueError, "got neither"),
    "id too large": ({"task_ids": torch.tensor([0, 1, 3, 0])}, ValueError, "task id 3 is out of range: valid ids are"),
    "id too small": ({"task_ids": torch.tensor([0, 1, -2, 0])}, ValueError, "task id -2 is out of range"),
    "float ids": ({"task_ids": torch.zeros(M)}, TypeError, "task_ids must be integers, got torch.float32"),
    "bool ids": ({"task_ids": torch.zeros(M, dtype=torch.bool)}, TypeError, "must be integers"),
    "ids as a list": ({"task_ids": [0, 0, 0, 0]}, TypeError, "use torch.tensor(task_ids)"),
    "wrong number of ids": ({"task_ids": torch.zeros(3).long()}, ValueError, "one id per batch row, (4,)"),
    "ids elsewhere": ({"task_ids": torch.zeros(M).long().to("meta")}, ValueError, "task_ids are on meta"),
    "A elsewhere": ({"lora_A": torch.randn(E, R, K, device="meta")}, ValueError, "lora_A is on meta but x is on cpu"),
    "integer x": ({"x": torch.ones(M, K, dtype=torch.long)}, TypeError, "x must be float16"),
    "fp8 x": ({"x": torch.ones(M, K).to(torch.float8_e4m3fn)}, TypeError, "got torch.float8_e4m3fn"),
    "weight of another dtype": ({"weight": torch.randn(N, K).half()}, TypeError, "use torch.autocast"),
    "scalar x": ({"x": torch.tensor(1.0)}, ValueError, "at least one dimension"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    changes, error, message = CASES[name]
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


OF_A_CALL = [
    *("x of another K", "integer x", "fp8 x", "scalar x", "weight of another dtype", "A elsewhere", "both routings"),
    *("no routing", "id too large", "id too small", "float ids", "bool ids", "ids as a list", "wrong number of ids"),
    "ids elsewhere",
]


@pytest.mark.parametrize("name", OF_A_CALL)
def test_a_layer_that_knows_its_tensors_still_judges_what_comes_with_a_call(name):
    changes, error, message = CASES[name]
    facts = {"bias": None, "router": None, "scaling": 1.0, "dropout_p": 0.0, "training": False}
    with pytest.raises(error, match=re.escape(message)):
        call(trusted_alora, **{**facts, **changes})


def test_the_good_call_is_good():
    assert call().shape == (M, N)
