"""A short run on the chip at hand: every plan is proven or has no kernel there, and everything can be timed."""

from __future__ import annotations

import pytest
import torch

from alora_kernels.kernels import tuned
from alora_kernels.kernels.tuned import OK, Table
from alora_kernels.ops.triton_backend import plan_on
from alora_kernels.tuning.gpu import Gpu
from alora_kernels.tuning.run import UNTAKEN, Shape, Tuner

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
SHAPES = (Shape("short square", 512, 1024, 1024), Shape("decode square", 64, 1024, 1024))


def test_a_short_run() -> None:
    place = torch.device("cuda", torch.cuda.current_device())
    key = tuned.identity(place)
    assert key is not None
    gpu = Gpu(place)
    tuner = Tuner(Table(key), SHAPES, gpu, repeats=100, deadline=gpu.now() + 300)
    left = tuner.run()
    table = tuner.table
    assert {name: said for name, said in table.verdicts.items() if said not in (OK, UNTAKEN)} == {}
    assert tuner.skipped == {}
    if not left:
        assert all(entry["plan"] for entry in table.plans.values()) and any(table.tiles.values())
        plan, reason = plan_on(place, "task", 2, 512, 1024, 1024)
        assert list(plan) == table.plans["task/2/short square"]["plan"] and "measured on this chip" in reason
