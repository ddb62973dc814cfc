"""The demo's step and the memory of a step: another commit in a venv of its own, judged, in processes that end."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest
import torch

from bench.models import build, demo, memory, training
from bench.models.build import BUILD, Worker
from bench.models.pair import ONE, model_work
from bench.report.rows import BOTH, EAGER, ROOT

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """A model and vocabulary of a few numbers, and none of what this machine has cached."""
    for module in (demo, training):
        monkeypatch.setattr(module, "in_cache", lambda: False)
        monkeypatch.setattr(module, "SMOLLM2", TINY)
    monkeypatch.setattr(memory, "SHAPE", TINY)
    monkeypatch.setattr(memory, "TOKENS", 16)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """This commit's package, as the other commit's would be."""
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("no git checkout here")
    return build.install("HEAD", tmp_path_factory.mktemp("venvs") / "build")


def test_a_venv_holds_the_commit_and_nothing_is_taken_twice(python, tmp_path):
    ask = "import alora_kernels, torch; print(alora_kernels.__file__, torch.__file__)"
    done = subprocess.run(
        [str(python), "-P", "-c", ask], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    ours, theirs = done.stdout.split()
    assert ours.startswith(str(python.parents[1]))
    assert theirs == torch.__file__
    made = python.stat().st_mtime_ns
    assert build.install("HEAD", python.parents[1]) == python
    assert python.stat().st_mtime_ns == made
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="an empty or a new folder"):
        build.install("HEAD", tmp_path)
    with pytest.raises(ValueError, match="no commit nothing"):
        build.install("nothing", tmp_path / "new")


def test_every_provider_steps_in_both_dtypes_and_a_spoilt_build_is_seen(tiny, python, monkeypatch):
    settings = [demo.STEP, replace(demo.STEP, case="demo step, bfloat16", dtype=torch.bfloat16)]
    names = (*training.MODELS, training.PLAIN, BUILD)
    made = []
    monkeypatch.setattr(
        demo, "model_work", lambda names, step, **told: made.append(step) or model_work(names, step, **told)
    )
    for work in demo.demo_works(names, settings, python):
        assert "random rows" in work.row.note and "always in float32" in work.row.note
        for candidate in work.candidates():
            ready = candidate.prepare(BOTH, EAGER)
            assert ready.check.ok, (work.row.case, candidate.name, ready.check)
            ready.run()
    exact, other = made
    assert other.fused.dtype == torch.bfloat16
    assert {p.dtype for n, p in other.fused.named_parameters() if "asymlora" in n} == {torch.float32}
    assert other.rows is exact.rows and "worker" not in other.__dict__  # one process serves both
    got = exact.worker.results()
    spoilt = {name: t * 1.01 if name.endswith("0.mlp.up_proj.asymlora_B.default") else t for name, t in got.items()}
    exact.worker.results = lambda: spoilt
    check = exact.check(BUILD, [torch.zeros(())])
    assert not check.ok and check.where.endswith("0.mlp.up_proj B")


def test_without_a_folder_for_it_the_build_says_what_it_needs(tiny):
    (work,) = demo.demo_works([ONE, BUILD], [demo.STEP], None)
    one, other = work.candidates()
    assert one.computes == "lora" and one.reason(BOTH, EAGER) is None
    assert "--build-venv" in other.reason(BOTH, EAGER)
    (other,) = memory.memory_work("memory all labelled", [BUILD], None).candidates()
    assert "--build-venv" in other.reason(BOTH, EAGER)


def test_memory_is_of_a_fresh_process_and_results_must_agree(tiny, python, monkeypatch):
    ballast = torch.ones(200_000_000)  # 800 MB of this process, which its children must not be charged with
    workers: list[Worker] = []
    monkeypatch.setattr(memory, "Worker", lambda *given: workers.append(Worker(*given)) or workers[-1])
    work = memory.memory_work("memory 1 in 8 labelled", memory.MODELS, python)
    ours, theirs = work.candidates()
    assert [sum(label != -100 for label in row["labels"]) for row in workers[0].job["rows"]] == [2] * 8
    first = ours.prepare(BOTH, EAGER)
    assert first.check.ok and 100 < first.peak_mb < 800 + 0 * ballast.numel()
    assert theirs.prepare(BOTH, EAGER).check.ok
    wrong = {name: t + 1 for name, t in workers[1].results().items()}
    monkeypatch.setattr(workers[1], "results", lambda: wrong)
    assert not theirs.prepare(BOTH, EAGER).check.ok
    process = workers[0]._process
    del work, ours, first, workers[0]  # `first` holds the worker's step
    assert process.poll() == 0  # no process stays behind


def test_a_worker_that_cannot_work_says_why(tiny):
    worker = Worker({"shape": TINY, "adapter": {"tasks": 0}, "numbers": None, "rows": []})
    with pytest.raises(RuntimeError, match="tasks"):
        worker.step()
