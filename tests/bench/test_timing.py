"""The rounds: each case once per round, in shuffled order; percentiles; a case that fails drops out."""

from __future__ import annotations

import pytest

from bench.timing import Timing, WallClock, interleaved, percentiles
from tests.bench.fakes import CountingClock, raising


def test_percentiles_are_values_that_were_measured():
    assert percentiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Timing(p20=2.0, p50=3.0, p80=5.0)
    assert percentiles([7.0]) == Timing(7.0, 7.0, 7.0)


def test_every_round_runs_every_case_once_in_another_order():
    seen: list[str] = []
    cases = {name: (lambda name=name: seen.append(name)) for name in "abcd"}
    turns: list[int] = []
    found = interleaved(cases, repeats=6, warmup=2, clock=CountingClock(), on_round=turns.append)
    rounds = ["".join(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 3
    assert turns == list(range(1, 9))
    assert list(found) == list("abcd")
    assert all(isinstance(timing, Timing) and timing.p20 > 8 for timing in found.values())  # 8 calls warmed up


def test_a_case_that_fails_drops_out_and_the_others_go_on():
    error = RuntimeError("no")
    found = interleaved({"good": lambda: None, "bad": raising(error)}, repeats=3, warmup=0, clock=CountingClock())
    assert found["bad"] is error
    assert isinstance(found["good"], Timing)


def test_an_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        interleaved({"a": raising(KeyboardInterrupt())}, repeats=1, clock=CountingClock())


def test_repeats_below_one_are_refused():
    with pytest.raises(ValueError, match="repeats"):
        interleaved({}, repeats=0)


def test_the_wall_clock_runs_once():
    ran: list[int] = []
    assert WallClock()(lambda: ran.append(1)) > 0
    assert ran == [1]
