"""The ledger: scores of a round, strict JSON, damage, resumption, a full disk; what its events say of clients."""

from __future__ import annotations

import errno
import json
import math
import os
from unittest.mock import Mock

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the extra `federated`")

from alora_kernels.federated import log as module
from alora_kernels.federated.log import Ledger, delta_m, read, scores, tracks
from tests.federated.ledgerfakes import (
    DOWN,
    REASON,
    SILENT,
    UP,
    client_event,
    judged_event,
    judgement,
    one_round,
    round_event,
    run_event,
    whole_run,
    written,
)


def timeless(events):
    return [{name: value for name, value in event.items() if name != "time"} for event in events]


# ---- scores


def test_a_round_gets_the_scores_of_its_accepted_clients(tmp_path):
    events = [
        run_event(("ann", "bob", "eve")),
        *one_round(1, {"ann": (0.5, 0.6), "bob": (0.2, 0.4)}, {"eve": REASON}),
        *one_round(2, {"ann": (0.75, 0.8), "eve": (0.1, 0.3)}, {"bob": SILENT}),
        *judgement(2, {"ann": 0.75, "bob": 0.3, "eve": 0.6}),
    ]
    rounds = [e for e in written(tmp_path / "l", events) if e["event"] == "round"]
    first, second, final = rounds
    assert first["before"] == {
        "mean": 0.35, "worst": 0.2, "worst_client": "bob", "delta_m": 0.0, "delta_m_clients": 2,
    }  # fmt: skip
    assert (first["after"]["mean"], first["after"]["delta_m"]) == (0.5, pytest.approx(-60.0))  # +20 %, +100 %
    # eve was not there in round 1: she has no baseline
    assert second["before"] == {
        "mean": 0.425, "worst": 0.1, "worst_client": "eve", "delta_m": pytest.approx(-50.0), "delta_m_clients": 1,
    }  # fmt: skip
    assert final["metrics"]["delta_m"] == pytest.approx(-50.0)  # ann +50 %, bob +50 %
    assert final["metrics"]["worst_client"] == "bob"


def test_a_metric_that_is_not_finite_stays_out_of_the_scores(tmp_path):
    events = written(tmp_path / "l", [run_event(), *one_round(1, {"ann": (0.5, math.nan), "bob": (0.3, 0.4)})])
    assert (events[-1]["before"]["mean"], events[-1]["after"]["mean"]) == (0.4, 0.4)


def test_a_round_without_accepted_clients_has_null_scores_and_without_a_run_none(tmp_path):
    events = written(tmp_path / "l", [run_event(), *one_round(1, {}, {"ann": REASON, "bob": SILENT})])
    assert events[-1]["after"] == {
        "mean": None, "worst": None, "worst_client": None, "delta_m": None, "delta_m_clients": 0,
    }  # fmt: skip
    assert timeless(written(tmp_path / "none", [round_event(1)])) == [round_event(1)]


# ---- the file


def test_lines_are_strict_json_with_a_time(tmp_path):
    path = tmp_path / "ledger.jsonl"
    bad = client_event(1, "ann", math.nan, math.inf, seconds=np.float32(1.5), examples=np.int64(7), time="made up")
    written(path, [run_event(), bad, {"event": "x", "list": (1, -math.inf), "name": "\udcff\n\x1b[2J ä"}])
    text = path.read_bytes()
    assert text.count(b"\n") == 3  # a newline in a value does not begin a line
    strict = [json.loads(line, parse_constant=pytest.fail) for line in text.decode("ascii").splitlines()]
    assert strict == read(path)
    assert (strict[1]["before"]["accuracy"], strict[1]["after"]["accuracy"]) == (None, None)
    assert (strict[1]["seconds"], strict[1]["examples"], strict[2]["list"]) == (1.5, 7, [1, None])
    assert all(event["time"].endswith("+00:00") for event in strict)


def test_an_event_needs_a_name(tmp_path):
    with Ledger(tmp_path / "m") as ledger, pytest.raises(ValueError, match=r"under 'event', got \['round'\]"):
        ledger.write({"round": 1})


@pytest.mark.parametrize("rest", ["", '{"event": "cli', '{"event": "client", "x": "', "{", "\x00\x00"])
def test_half_a_last_line_is_left_out_and_a_whole_one_counts_without_its_end(tmp_path, rest):
    events = written(tmp_path / "l", whole_run())
    text = (tmp_path / "l").read_text()
    (tmp_path / "l").write_text(text + rest if rest else text[:-1])
    assert read(tmp_path / "l") == events


@pytest.mark.parametrize("line", ['{"event": "cli', "[1]", '{"round": 1}', '{"event": "x", "v": NaN}', "", "\x00", "ä"])
def test_other_damage_is_named_by_its_line(tmp_path, line):
    (tmp_path / "l").write_text('{"event": "run"}\n' + line + '\n{"event": "end"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is no event"):
        read(tmp_path / "l")


# ---- resumption


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("killed", [0, 1, 3, None])
def test_a_resumed_ledger_equals_an_uninterrupted_one(tmp_path, at, killed):
    """Killed some lines after the checkpoint of round `at` (None: after the end), with half a line written."""
    events = whole_run()
    whole = timeless(written(tmp_path / "whole", events))
    after = 1 + 3 * at  # the run's line, three lines a round
    written(tmp_path / "cut", events[: None if killed is None else after + killed])
    with open(tmp_path / "cut", "a") as file:
        file.write('{"event": "rou')
    resumed = run_event(rounds=3, resumed_at=at)
    again = timeless(written(tmp_path / "cut", [resumed, *events[after:]], resume_from=at))
    assert again.pop(after) == resumed
    assert again == whole
    assert sorted(os.listdir(tmp_path)) == ["cut", "whole"]  # no draft is left


def test_resuming_earlier_forgets_the_later_resumption(tmp_path):
    events = whole_run()
    written(tmp_path / "l", events[:7])
    written(tmp_path / "l", [run_event(resumed_at=2), *events[7:]], resume_from=2)
    left = written(tmp_path / "l", [], resume_from=1)
    assert timeless(left) == timeless(written(tmp_path / "first", events[:4]))


def test_a_round_without_its_closing_line_is_played_again(tmp_path):
    with pytest.raises(FileNotFoundError, match="ledger"):
        Ledger(tmp_path / "ledger", resume_from=1)
    events = [run_event(), *one_round(1, {"ann": (0.1, 0.2)}), client_event(1, "bob")]
    assert len(written(tmp_path / "ledger", events)) == 4
    assert len(written(tmp_path / "ledger", [], resume_from=1)) == 3


@pytest.mark.parametrize(
    ("at", "error"),
    [(-1, "rounds 1 to 3"), (4, "resume_from=4, but .* rounds 1 to 3"), (1, "No space left")],
    ids=["before", "beyond", "no room to cut"],
)
def test_a_failed_resumption_leaves_the_old_file(tmp_path, monkeypatch, at, error):
    before = written(tmp_path / "l", whole_run())
    if at == 1:
        monkeypatch.setattr(module.os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises((ValueError, OSError), match=error):
        Ledger(tmp_path / "l", resume_from=at)
    assert read(tmp_path / "l") == before
    assert os.listdir(tmp_path) == ["l"]


# ---- a full disk


class FullDisk:
    """A file that takes `room` bytes more, then fails as told."""

    def __init__(self, file, room, short):
        self.file, self.room, self.short = file, room, short

    def write(self, line):
        taken = self.file.write(line[: self.room])
        if not self.short and taken < len(line):
            raise OSError(errno.ENOSPC, "No space left on device")
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_full_disk_leaves_whole_lines(tmp_path, room, short):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.write(run_event())
        before, real = path.read_bytes(), ledger._file
        ledger._file = FullDisk(real, room, short)
        with pytest.raises(OSError, match="make room, then continue with --resume") as caught:
            ledger.write(client_event(1, "ann"))
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_bytes() == before
        ledger._file = real
        ledger.write(round_event(1))
    events = read(path)
    assert [event["event"] for event in events] == ["run", "round"]
    assert events[1]["before"]["mean"] is None  # what was not written is not counted


def test_a_file_size_limit_of_the_system(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of a process exist on Unix only")
    path = tmp_path / "ledger.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(path) as ledger:
        ledger.write(run_event())
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        try:
            with pytest.raises(OSError, match="only 20 of") as caught:
                ledger.write(run_event())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(path)
        assert path.read_bytes() == before


def test_after_a_write_that_cannot_be_taken_back_nothing_follows(tmp_path):
    class Stuck(FullDisk):
        def truncate(self, size):
            raise OSError(errno.EIO, "Input/output error")

    with Ledger(tmp_path / "l") as ledger:
        ledger.write(run_event())
        ledger._file = Stuck(ledger._file, 9, False)
        with pytest.raises(OSError, match="No space left"):
            ledger.write(round_event(1))
        with pytest.raises(ValueError, match="closed"):
            ledger.write(round_event(1))
    assert len(read(tmp_path / "l")) == 1


def test_a_finished_round_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(module.os, "fsync", lambda handle, real=os.fsync: synced.append(real(handle)))
    with Ledger(tmp_path / "l") as ledger:
        ledger.write(client_event(1, "ann"))
        assert not synced
        ledger.write(round_event(1))
        assert len(synced) == 1


# ---- what the events say


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


def test_delta_m_of_no_change_is_plus_zero_and_needs_a_baseline():
    assert math.copysign(1, delta_m({"a": 0.5}, {"a": 0.5})) == 1
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
