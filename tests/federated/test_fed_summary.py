"""What a summary makes of events: delta-m by hand, worst clients, tracks, totals, states."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("flwr", reason="needs the extra `federated`")

from alora_kernels.federated.log import delta_m, scores, tracks
from tests.federated.ledgerfakes import (
    DOWN,
    REASON,
    SILENT,
    UP,
    client_event,
    judged_event,
    judgement,
    one_round,
    run_event,
    whole_run,
)


@pytest.mark.parametrize(
    ("values", "baseline", "higher", "expected"),
    [
        ({"a": 0.6, "b": 0.5}, {"a": 0.5, "b": 0.5}, True, -10.0),  # +20 % and 0 %
        ({"a": 0.6, "b": 0.5}, {"a": 0.5, "b": 0.5}, False, 10.0),
        ({"a": 0.4}, {"a": 0.5, "b": 0.1}, True, 20.0),  # worse; b is not asked
        ({"a": 1.0, "b": 0.1}, {"a": 0.5, "b": 0.2}, True, -25.0),  # +100 % and -50 %
        ({"a": 0.5}, {"a": 0.0}, True, None),
        ({"a": 0.5}, {"a": -0.5}, True, None),
        ({"a": math.nan}, {"a": 0.5}, True, None),
        ({"a": 0.5}, {"a": math.inf}, True, None),
    ],
)
def test_delta_m_by_hand(values, baseline, higher, expected):
    got = delta_m(values, baseline, higher)
    assert got is None if expected is None else got == pytest.approx(expected, abs=1e-12)


def test_no_change_is_plus_zero():
    assert math.copysign(1, delta_m({"a": 0.5}, {"a": 0.5})) == 1


def test_delta_m_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="no value for bob"):
        delta_m({"ann": 0.5, "bob": 0.5}, {"ann": 0.5})
    with pytest.raises(ValueError, match="values is empty"):
        delta_m({}, {"ann": 0.5})


def test_worst_follows_the_direction():
    values = {"b": 0.3, "a": 0.3, "c": 0.9}
    assert scores(values, {})["worst_client"] == "a"  # the first by name of two equals
    assert (scores(values, {}, False)["worst_client"], scores(values, {}, False)["worst"]) == ("c", 0.9)
    assert scores(values, {}) == {
        "mean": pytest.approx(0.5), "worst": 0.3, "worst_client": "a", "delta_m": None, "delta_m_clients": 0,
    }  # fmt: skip


def test_totals():
    events = [
        run_event(("ann", "bob")),
        *one_round(1, {"ann": (0.5, 0.6)}, {"bob": REASON}),
        *one_round(2, {"ann": (0.5, 0.6), "bob": (0.5, 0.6)}),
        client_event(3, "ann"),
        client_event(3, "bob", reason=REASON),
        client_event(3, "bob", reason=SILENT, bytes_up=0) | {"client": None},
        *judgement(3, {"ann": 0.5, "bob": 0.6}),
    ]
    ann, bob = tracks(events)
    assert (ann.down, ann.up, bob.down, bob.up) == (4 * DOWN, 3 * UP, 5 * DOWN, 3 * UP)
    assert (ann.reasons, bob.reasons) == ({}, {REASON: 2, SILENT: 1})  # the silent node is known from round 2


def test_nobody_collects_rejections_in_anothers_name():
    events = [
        run_event(("ann", "bob")),
        client_event(1, "ann"),
        client_event(1, "ann", node=66, reason="name ann is taken"),  # a stranger who claims to be ann
        client_event(1, "new", node=77, reason=REASON),
    ]
    reasons = {"ann": {}, "bob": {}, "node 66": {"name ann is taken": 1}, "new": {REASON: 1}}
    assert {track.name: track.reasons for track in tracks(events)} == reasons
    assert [track.name for track in tracks(events)] == list(reasons)


def test_a_track_puts_metrics_under_the_rounds_behind_the_model():
    track = tracks(whole_run(rounds=2))[0]
    assert track.shared == {0: 0.2, 1: pytest.approx(0.3), 2: pytest.approx(0.4)}
    assert track.local == {1: pytest.approx(0.35), 2: pytest.approx(0.45)}
    assert dict(track.nbytes) == {1: UP + DOWN, 2: UP + DOWN}  # without the evaluation


@pytest.mark.parametrize(
    ("events", "last", "state"),
    [
        ([], 0, "waiting"),
        ([], 3, "waiting"),
        ([client_event(3, "ann")], 3, "ok"),
        ([client_event(2, "ann")], 3, "not asked"),
        ([client_event(3, "ann", reason=SILENT)], 3, "no reply"),
        ([client_event(3, "ann", reason=REASON)], 3, f"rejected: {REASON}"),
        ([client_event(3, "ann"), client_event(3, "ann", reason="second reply")], 3, "ok"),
        ([client_event(3, "ann", reason=REASON), judged_event(3, "ann", 0.5)], 3, "ok"),
    ],
)
def test_states(events, last, state):
    assert tracks([run_event(), *events])[0].state(last) == state
