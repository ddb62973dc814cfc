"""`bench chaos`: what it counts as lost and wrong, its table; and its short version, in which nothing is."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest

from bench.chaos.client import Heard, Load
from bench.chaos.command import ATTACKS, attacked
from bench.chaos.rows import Row, block
from bench.chaos.server import Server
from bench.chaos.versions import GONE, Versions

SIZES = {"tasks": 2, "changing": 1, "new_tokens": 3}
PROMPT = (1, 2)


@pytest.fixture
def load(tmp_path) -> Load:
    """Of two tasks, the first of which has a second version, 2."""
    adapters = SimpleNamespace(name=lambda task: f"task-{task}")
    versions = Versions(adapters, None, None, tmp_path, **SIZES)  # type: ignore[arg-type]
    versions.live = {"task-0": {0}, "task-1": {1}}
    versions.answers = {(0, PROMPT): "zero", (1, PROMPT): "one", (2, PROMPT): "two"}
    return Load(Server("tiny-random", [], tmp_path, tmp_path), versions, Random(0))


def test_any_version_that_could_answer_meanwhile_is_right_and_no_other(load):
    versions = load.versions
    with versions.watched(0) as allowed:
        versions.may(0, 2)
        with versions.watched(0) as later:
            pass
        versions.now(0, 2)
        versions.may(0, GONE)
    with versions.watched(0) as last:
        pass
    versions.may(0, 0)  # nobody is on its way
    assert (allowed, later, last) == ({0, 2, GONE}, {0, 2}, {2, GONE})
    for who, text, is_right in ((allowed, "zero", True), (allowed, "two", True), (allowed, "one", False),
                                ({2, GONE}, "zero", False), ({GONE}, "two", False)):  # fmt: skip
        assert versions.right(who, PROMPT, text) == is_right


@pytest.mark.parametrize(
    ("heard", "allowed", "kind"),
    [
        (Heard(200, "zero", 3, True), {0}, "right"),
        (Heard(200, "two", 3, True), {0}, "wrong"),
        (Heard(200, "zero", 2, True), {0}, "wrong"),
        (Heard(200, "zer", 2, False), {0}, "lost"),
        (Heard(404, "gone", 0, True), {0, GONE}, "refused"),
        (Heard(404, "gone", 0, True), {0}, "lost"),
        (Heard(500, "", 0, True), {0}, "lost"),
        (Heard(503, "", 0, True), {0}, "lost"),
    ],
)
def test_what_counts_as_right_refused_wrong_and_lost(load, heard, allowed, kind):
    load._judge(heard, allowed, 0, PROMPT)
    assert dict(load.tally.counts) == {kind: 1}
    assert sum(load.tally.ended.values()) - load.tally.ended["tried"] == 1 + (kind == "refused")


def test_a_request_of_a_server_that_is_gone_is_lost(load):
    load.server.away = False
    asyncio.run(load.judged(0, PROMPT, stream=False))
    assert dict(load.tally.counts) == {"lost": 1} and "Connect" in load.tally.faults[0]


def test_requests_that_its_counters_do_not_account_for(load, monkeypatch):
    lines = [f"alora_requests_{name}" for name in (
        'total{finish_reason="stop",task="a"} 3.0', 'total{task="b"} 2.0', "waiting 1.0", "running 1.0",
        "refused_total 9.0",
    )]  # fmt: skip
    text = ["\n".join(lines), "\n".join([*lines, "alora_requests_taken_total 8.0"])]
    monkeypatch.setattr("bench.chaos.server._get", lambda url: text.pop(0))
    assert asyncio.run(load.server.unaccounted()) is None
    assert asyncio.run(load.server.unaccounted()) == 1


ROW = Row("crowd", "abc1234", "2026-01-02 10:00:00", "a CPU", "2.13", 0, 1000, "streams", 2000, 2000, 3, 0, 0,
          600.0, 606.0, 14.0, 15.0, 61.0, "some waited")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "held"),
    [({}, True), ({"lost": 1}, False), ({"wrong": 1}, False), ({"mb_after": 612.5}, False),
     ({"files_after": 17.0}, False), ({"mb_before": None, "mb_after": None}, True)],
)  # fmt: skip
def test_what_holds(changes, held):
    assert replace(ROW, **changes).held == held


def test_the_page_shows_the_newest_row_of_each_attack():
    old = replace(ROW, date="2025-12-31 10:00:00", lost=7)
    text = block([old, ROW, replace(old, attack="churn", commit="def5678", note="")], "chaos.csv")
    assert "| crowd | 1,000 streams | 2,000 | 2,000 | 3 | 0 | 0 | 600 | 606 | +1.0 % | 14 | 15 | 61 |" in text
    assert "commit abc1234, 2026-01-02" in text and "commit def5678, 2025-12-31" in text
    assert "- crowd: some waited." in text and "- churn" not in text


def test_nothing_is_lost_and_nothing_wrong_in_the_short_version():
    rows = list(attacked(list(ATTACKS), seed=1, quick=True, show=lambda text: None))
    assert [row.attack for row in rows] == list(ATTACKS)
    for row in rows:
        assert (row.lost, row.wrong) == (0, 0), f"{row.attack}: {row.note}"
        assert row.tried == row.survived > 0, row
