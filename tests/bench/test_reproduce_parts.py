"""The parts of the experiments against what can be said without them: splits, verdicts."""

from __future__ import annotations

import pytest
import torch

from bench.reproduce.claims import Claim
from bench.reproduce.clients import split
from bench.reproduce.rows import spread


@pytest.mark.parametrize("alpha", [0.2, 1.0, 100.0])
def test_a_split_gives_every_row_to_one_client(alpha: float) -> None:
    targets = torch.arange(600) % 6
    parts = split(targets, 3, alpha, 8, seed=0)
    assert torch.cat(parts).sort().values.equal(torch.arange(600))
    assert min(map(len, parts)) >= 8


def test_small_alpha_makes_clients_differ() -> None:
    targets = torch.arange(600) % 6

    def distance(alpha: float) -> float:
        shares = [targets[p].bincount(minlength=6) / len(p) for p in split(targets, 3, alpha, 8, seed=0)]
        return float((shares[0] - shares[1]).abs().sum())

    assert distance(0.1) > 2 * distance(100.0)


def test_a_split_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 8"):
        split(torch.zeros(10, dtype=torch.int64), 3, 1.0, 8, seed=0)


@pytest.mark.parametrize(
    ("agrees", "words"),
    [
        ([], "not run yet"),
        ([True], "holds (1 of 1 seeds; 1 seed, too few for a spread)"),
        ([True, True, True], "holds (3 of 3 seeds)"),
        ([False, False], "does not hold at this size (0 of 2 seeds)"),
        ([True, False, True], "undecided at this size (2 of 3 seeds)"),
    ],
)
def test_a_verdict_counts_seeds(agrees: list[bool], words: str) -> None:
    assert Claim("", "", "", "", agrees).verdict == words


def test_a_spread_needs_two_seeds() -> None:
    assert spread([]) == "not run yet"
    assert spread([0.5]) == "0.500 (1 seed)"
    assert spread([1.0, 3.0], "+.1f") == "+2.0 ± 1.4"
