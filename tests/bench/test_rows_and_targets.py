"""The newest run counts; targets divide what belongs together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import gpu
from bench.cpu import DEMO, DTYPES, LAYER, SECTIONS, works
from bench.layers.providers import PROVIDERS
from bench.report.rows import BOTH, EAGER, FORWARD, GRAPH, Row, newest, origin, slug
from bench.report.targets import CPU_TARGETS, GPU_TARGETS, between, judge

ROW = Row(
    command="gpu", date="2026-01-02 00:00:00", case="task 1", routing="task", direction=FORWARD, mode=GRAPH,
    provider="fused", computes="task", m=1, k=2, n=3, r=4, e=5, p20_ms=1.0, p50_ms=2.0, p80_ms=3.0, peak_mb=10.0,
)  # fmt: skip


def test_the_newest_run_that_timed_something_counts():
    old, new = ROW, replace(ROW, date="2026-01-03 00:00:00")
    failed = replace(new, date="2026-01-04 00:00:00", status="failed: x", p50_ms=None)
    elsewhere = replace(old, case="other")
    assert newest([old, elsewhere, new, failed], lambda row: row.group, lambda row: row.timed) == [new, elsewhere]


def rows_of(**times: float | None) -> list[Row]:
    return [replace(ROW, provider=name, p50_ms=t, status="ok" if t else "wrong") for name, t in times.items()]


@pytest.mark.parametrize(("fused", "met"), [(1.09, True), (1.1, True), (1.11, False)])
def test_at_most(fused, met):
    target = between("task 1", FORWARD, "fused", "frozen", 1.1, 1.0, at_most=True)
    verdict = judge(target, rows_of(fused=fused, frozen=1.0))
    assert verdict.measured == pytest.approx(fused)
    assert verdict.met is met


@pytest.mark.parametrize(("other", "met"), [(3.1, True), (2.9, False)])
def test_at_least(other, met):
    target = between("task 1", FORWARD, "authors' loop", "fused", 1.5)
    assert judge(target, rows_of(fused=2.0) + rows_of(**{"authors' loop": other})).met is met


def test_peak_memory():
    rows = [ROW, replace(ROW, provider="frozen", peak_mb=8.0)]
    target = between("task 1", FORWARD, "fused", "frozen", 1.1, at_most=True, quantity="peak_mb")
    assert judge(target, rows).measured == pytest.approx(1.25)
    assert judge(target, [ROW, replace(ROW, provider="frozen", peak_mb=None)]).reason == "frozen: not known"


def test_slowest_to_fastest():
    target = between("tasks *", FORWARD, "fused", "fused", 1.1, at_most=True)
    rows = [replace(ROW, case=f"tasks {e}", p50_ms=t) for e, t in ((1, 2.0), (8, 2.1), (64, 2.3))]
    rows.append(replace(ROW, case="task 9", p50_ms=100.0))
    verdict = judge(target, rows)
    assert verdict.measured == pytest.approx(1.15)
    assert verdict.met is False
    assert judge(target, rows[:1]).measured is None
    assert "wrong" in judge(target, [rows[0], replace(rows[1], status="wrong")]).reason


def test_what_was_not_measured_in_one_run_is_not_divided():
    target = between("task 1", FORWARD, "fused", "frozen", 1.1, at_most=True)
    frozen = replace(ROW, provider="frozen")
    assert judge(target, [ROW]).reason == "frozen: not run"
    assert judge(target, [ROW, replace(frozen, status="wrong")]).reason == "frozen: wrong"
    assert judge(target, [ROW, replace(frozen, mode=EAGER)]).reason == "frozen: not run"
    assert judge(target, [ROW, replace(frozen, date="2026-01-01")]).reason == "not of one run"
    assert judge(target, [ROW, frozen]).measured == 1.0


def test_every_target_asks_for_something_that_is_run():
    run = {}
    shape = {"m": 32, "k": 8, "n": 8, "e": 2, "r": 2}
    on_gpu = [*gpu.works(), *gpu.models(gpu.MODELS, 1)]
    for work in [*works(SECTIONS, [*LAYER, *PROVIDERS, *DEMO], shape, DTYPES), *on_gpu]:
        for direction in work.directions:
            run[work.row.case, direction] = {candidate.name for candidate in work.candidates()}
    for target in (*CPU_TARGETS, *GPU_TARGETS):
        cases = [names for (case, d), names in run.items() if d == target.direction and _matches(target.case, case)]
        assert cases, target
        assert all({target.above.provider, target.below.provider} <= names for names in cases), target


def _matches(pattern: str, case: str) -> bool:
    return case.startswith(pattern[:-1]) if pattern.endswith("*") else case == pattern


def test_the_frozen_backward_is_dx_alone():
    work = next(w for w in gpu.works(["frozen"]) if BOTH in w.directions)
    assert [candidate.computes for candidate in work.candidates()] == ["frozen"]


def test_names_of_machines():
    assert slug("NVIDIA H200") == "nvidia-h200"
    row = Row(command="cpu", **origin("cpu", "triton"))
    assert row.date and row.torch and row.triton
    assert " thread" in row.device
    assert row.commit == "unknown" or len(row.commit.split("+")[0]) >= 7
