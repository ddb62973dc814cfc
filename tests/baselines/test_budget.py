"""Parameters counted before anything is built, and ranks of equal cost."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_kernels.adapters.method import METHODS
from alora_kernels.baselines.methods import parameters_of, rank_for
from tests.support.refusals import refused


def test_counts_by_hand():
    one = [(10, 7)]
    want = {"alora": 3 * 40 + 28, "alora-soft": 2 * 40 + 28 + 20, "lora": 68, "lora-per-task": 3 * 68,
            "hydralora": 40 + 2 * 28 + 20}  # fmt: skip
    for name, number in want.items():
        assert parameters_of(name, 4, one, tasks=3, num_experts=2) == number
        assert parameters_of(name, 4, one * 5, tasks=3, num_experts=2) == 5 * number


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(METHODS)),
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_no_rank_is_nearer(name, r, shapes, tasks, experts):
    def off(rank: int) -> int:
        sizes = {"tasks": tasks, "num_experts": experts}
        return abs(parameters_of(name, rank, shapes, **sizes) - parameters_of("alora", r, shapes, **sizes))

    try:
        chosen = rank_for(name, r, shapes, tasks=tasks, num_experts=experts)
    except ValueError:
        assert off(0) <= off(1)
        return
    assert chosen >= 1
    best = min(range(64 * 10 + 1), key=lambda rank: (off(rank), rank))
    assert chosen == best
    if name == "alora":
        assert chosen == r


def test_a_budget_below_rank_one_says_which_r_would_do():
    wide = [(10, 1000)]
    with pytest.raises(ValueError, match=r"lora-per-task needs 9090 .* r=1 and 9 tasks: give r of at least (\d+)") as e:
        rank_for("lora-per-task", 1, wide, tasks=9, num_experts=2)
    enough = int(str(e.value).split("at least ")[1].split(",")[0])
    assert rank_for("lora-per-task", enough, wide, tasks=9, num_experts=2) == 1
    refused("budget", rank_for, "lora-per-task", enough - 1, wide, tasks=9, num_experts=2)
    refused("no layer is adapted", rank_for, "lora", 1, [], tasks=9, num_experts=2)


def test_importing_the_budget_imports_nothing_heavy():
    code = "import sys, alora_kernels.adapters.method; print({'peft', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
