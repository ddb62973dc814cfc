"""The runner: nothing wrong is timed, nothing that fails ends the run, what was measured stays; its shuffled rounds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import typer

from bench import run as runs
from bench.layers import providers
from bench.layers.layer import Provider, layer_work
from bench.layers.problem import Case
from bench.report.rows import BOTH, EAGER, FORWARD, GRAPH, Row
from bench.report.sheet import Sheet, read
from bench.report.targets import FUSED
from bench.run import Runner, Work
from bench.timing import Timing, WallClock, interleaved, percentiles
from tests.bench.fakes import WRONG, CountingClock, FakeCandidate, FakeWork, raising

BASE = {"command": "cpu", "commit": "abc", "date": "2026-01-01 00:00:00", "device": "a machine"}


def run(works: list[Work], path: Path, modes: tuple[str, ...] = (EAGER,)) -> dict[str, Row]:
    rows = Runner(Sheet(path, Row), BASE, repeats=3, clock=CountingClock()).run(works, modes)
    on_disk = [(row.provider, row.direction, row.mode, row.status, row.note) for row in read(path, Row)]
    assert on_disk == [(row.provider, row.direction, row.mode, row.status, row.note) for row in rows]
    return {row.provider: row for row in rows}


def test_rows_say_everything(tmp_path):
    work = layer_work(Case("small", "task", m=32, k=8, n=8, r=2, e=2), providers.find(["fused", "hoisted"]), [BOTH])
    rows = run([work], tmp_path / "out.csv")
    row = rows["fused"]
    assert (row.case, row.routing, row.computes, row.direction, row.mode) == ("small", "task", "task", BOTH, EAGER)
    assert (row.m, row.k, row.n, row.r, row.e, row.dtype) == (32, 8, 8, 2, 2, "float32")
    assert (row.command, row.commit, row.device) == ("cpu", "abc", "a machine")
    assert row.status == "ok"
    assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
    assert row.worst_error <= row.allowed_error
    assert row.peak_mb is None  # not known on CPUs


def test_a_wrong_provider_is_reported_and_not_timed(tmp_path):
    def off_by_a_little(problem):
        layer = providers.PROVIDERS["hoisted"].build(problem)
        forward = layer.forward
        return dataclasses.replace(layer, forward=lambda: forward() * 1.001)

    wrong = Provider("wrong", {"task": "task"}, off_by_a_little)
    case = Case("small", "task", m=32, k=8, n=8, r=2, e=2)
    rows = run([layer_work(case, [*providers.find(["fused"]), wrong], [FORWARD])], tmp_path / "out.csv")
    assert rows["wrong"].status == "wrong"
    assert rows["wrong"].p50_ms is None
    assert rows["wrong"].worst_error > rows["wrong"].allowed_error
    assert rows["wrong"].note == "worst tensor: y"
    assert rows["fused"].timed


def test_what_is_wrong_never_runs_again(tmp_path):
    wrong, good = FakeCandidate("wrong", check=WRONG), FakeCandidate("good")
    run([FakeWork([wrong, good])], tmp_path / "out.csv")
    assert wrong.runs == 0
    assert good.runs == 4  # one to warm up, three that count


def test_out_of_memory_is_a_row_and_the_run_goes_on(tmp_path):
    full = raising(torch.OutOfMemoryError("CUDA out of memory"))
    fakes = [
        FakeCandidate("building", preparing=full),
        FakeCandidate("running", running=full),
        FakeCandidate("on the host", preparing=raising(MemoryError())),
        FakeCandidate("good"),
    ]
    rows = run([FakeWork(fakes), FakeWork([FakeCandidate("next")])], tmp_path / "out.csv")
    assert [name for name, row in rows.items() if row.status == "out of memory"] == [
        "building",
        "on the host",
        "running",
    ]
    assert rows["good"].timed and rows["next"].timed


def test_what_fails_or_is_not_there_says_why(tmp_path):
    fakes = [
        FakeCandidate("broken", preparing=raising(RuntimeError("two\nlines"))),
        FakeCandidate("absent", missing="vllm is not installed"),
    ]
    rows = run([FakeWork(fakes)], tmp_path / "out.csv")
    assert rows["broken"].status == "failed: RuntimeError: two lines"
    assert rows["absent"].status == "not available: vllm is not installed"


def test_what_has_no_backward_or_no_graph_takes_no_part_in_it():
    work = layer_work(
        Case("small", "task", m=32, k=8, n=8, r=2, e=2), providers.find(["PEFT mixed batch", "grouped by task"])
    )
    grouped, mixed = work.candidates()
    assert mixed.reason(BOTH, EAGER) == "it has no backward"
    assert mixed.reason(FORWARD, EAGER) is None
    assert "CUDA graph" in grouped.reason(BOTH, GRAPH)
    assert grouped.reason(BOTH, EAGER) is None


def test_an_interrupt_keeps_the_rows(tmp_path):
    path = tmp_path / "out.csv"
    works = [
        FakeWork([FakeCandidate("first")]),
        FakeWork([FakeCandidate("second", running=raising(KeyboardInterrupt()))]),
    ]
    runner = Runner(Sheet(path, Row), BASE, repeats=3, clock=CountingClock())
    with pytest.raises(KeyboardInterrupt):
        runner.run(works, [EAGER])
    assert [row.provider for row in read(path, Row)] == ["first"]


def _measure(path: Path, *works: Work) -> None:
    asked = {"denominator": FUSED, "targets": (), "clock": CountingClock()}
    runs.measure("cpu", "cpu", works, [EAGER], out=path, repeats=2, **asked)


def test_a_session_that_is_interrupted_says_how_many_rows_are_where(tmp_path, capsys):
    path = tmp_path / "out.csv"
    works = [
        FakeWork([FakeCandidate("first")]),
        FakeWork([FakeCandidate("second", preparing=raising(KeyboardInterrupt()))]),
    ]
    with pytest.raises(typer.Exit) as exit_:
        _measure(path, *works)
    assert exit_.value.exit_code == runs.INTERRUPTED
    assert f"interrupted: 1 row written to {path}" in capsys.readouterr().out
    assert len(read(path, Row)) == 1


def test_a_session_with_a_wrong_result_fails(tmp_path, capsys):
    with pytest.raises(typer.Exit) as exit_:
        _measure(tmp_path / "out.csv", FakeWork([FakeCandidate("bad", check=WRONG)]))
    assert exit_.value.exit_code == 1
    assert "WRONG, not timed" in capsys.readouterr().out


def test_a_session_refuses_a_foreign_csv(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(typer.BadParameter, match="other columns"):
        _measure(path, FakeWork([FakeCandidate("first")]))
    assert path.read_text() == "a,b\n1,2\n"


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
