"""The CPU cases as pytest-benchmark entries, for comparing two commits: `pytest bench --benchmark-only`.

The README's figures come from `python -m bench cpu`, which interleaves. Every entry is verified before it is timed,
like there. Without `--benchmark-only` each runs once and only verifies.
"""

from __future__ import annotations

from typing import Any

import pytest

from .cpu import works
from .layers.providers import PROVIDERS
from .report.rows import EAGER
from .run import Candidate, Work

TIMED = ("frozen", "fused", "hoisted", "authors' loop", "PEFT LoRA", "PEFT mixed batch")
SHAPE = {"m": 512, "k": 768, "n": 768, "e": 8, "r": 16}


def _entries() -> list[Any]:
    chosen = works(["layer", "decode"], [name for name in PROVIDERS if name in TIMED], SHAPE)
    return [
        pytest.param(work, candidate, id=f"{work.row.case}-{candidate.name}")
        for work in chosen
        for candidate in work.candidates()
    ]


@pytest.mark.parametrize(("work", "candidate"), _entries())
def test_layer(benchmark: Any, work: Work, candidate: Candidate) -> None:
    direction = work.directions[0]
    if (reason := candidate.reason(direction, EAGER)) is not None:
        pytest.skip(f"{candidate.name}: {reason}")
    ready = candidate.prepare(direction, EAGER)
    assert ready.check.ok, f"{ready.check.where}: error {ready.check.worst:.1e}, allowed {ready.check.allowed:.1e}"
    benchmark.group = f"{work.row.case}, {direction}"
    benchmark(ready.run)
