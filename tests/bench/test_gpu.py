"""The GPU command: its wiring on any machine with the device faked, its clock and graphs on a GPU."""

from __future__ import annotations

import dataclasses

import peft  # noqa: F401, before a device is faked: on its way in it looks for one
import pytest
import torch
from typer.testing import CliRunner

from bench import gpu, timing
from bench.__main__ import app
from bench.layers.layer import layer_work
from bench.layers.problem import Case
from bench.layers.providers import find
from bench.models.pair import llama
from bench.report.rows import BOTH, EAGER, FORWARD, GRAPH, MODES, Row
from bench.report.sheet import Sheet, read
from bench.run import Runner
from tests.bench.fakes import CountingClock


def test_every_case_from_end_to_end_with_a_faked_device(tmp_path, monkeypatch):
    """All that is not CUDA itself: cases, providers, both modes, rows, tables and targets, at sizes of a toy."""
    real = gpu._case

    def small(*arguments: object, **options: object) -> Case:
        case = real(*arguments, **options)
        m = case.m if case.layout == "rows" else 2 * case.batch
        return dataclasses.replace(case, m=m, k=24, n=32, r=4, dtype=torch.float32, device="cpu")

    monkeypatch.setattr(gpu, "_case", small)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(gpu, "eight_billion", lambda n: lambda: llama(**shape, intermediate_size=48, vocab_size=64))
    for name in ("STEP", "TOKEN"):
        toy = {"tokens": 8, "rows": 3, "tasks": 3, "r": 2, "answer": 2, "dtype": torch.float32, "device": "cpu"}
        monkeypatch.setattr(gpu, name, dataclasses.replace(getattr(gpu, name), **toy))
    monkeypatch.setattr(gpu, "CudaClock", CountingClock)
    monkeypatch.setattr(timing, "capture", lambda step: step)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    names = ("frozen", "fused", "hoisted", "grouped by task", "PEFT LoRA task by task", "PEFT mixed batch")
    chosen = [x for name in names for x in ("--provider", name)]
    out = tmp_path / "out.csv"
    done = CliRunner().invoke(app, ["gpu", *chosen, "--repeats", "1", "--out", str(out)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    rows = read(out, Row)
    assert {row.case for row in rows} == {work.row.case for work in [*gpu.works(), *gpu.models(gpu.MODELS, 1)]}
    assert {row.mode for row in rows} == set(MODES)
    refused = [row for row in rows if not row.timed]
    whole = [row for row in rows if row.whole_model]
    assert not [row.status for row in whole if row.status.startswith("failed")]
    assert {(row.case, row.provider) for row in whole if row.timed} == {
        *(("model step", name) for name in ("frozen", "fused", "PEFT LoRA task by task")),
        *(("model decode", name) for name in ("frozen", "fused", "PEFT mixed batch")),
    }
    assert all(row.tokens_per_second for row in whole if row.timed) and "tokens/s" in done.output
    assert {(row.case, row.mode) for row in whole if not row.timed} == {("model step", GRAPH), ("model decode", GRAPH)}
    hosts = {("grouped by task", GRAPH), ("PEFT mixed batch", GRAPH)}  # they look at the ids
    assert {(row.provider, row.mode) for row in refused if not row.whole_model} == hosts
    assert all(row.device == "NVIDIA H200" for row in rows)
    assert "slowest / fastest" in done.output
    assert "LoRAFusion: not run" in done.output


@pytest.mark.gpu
def test_both_modes_on_a_gpu(tmp_path):
    case = Case("small", "task", m=512, k=256, n=512, e=4, dtype=torch.bfloat16, device="cuda")
    work = layer_work(case, find(["frozen", "fused", "hoisted", "Unsloth-style addmm"]))
    sheet = Sheet(tmp_path / "out.csv", Row)
    rows = Runner(sheet, {}, repeats=5, clock=timing.CudaClock()).run([work], MODES)
    assert len(rows) == 4 * 2 * 2
    for row in rows:
        assert row.timed, row
        assert row.peak_mb >= 512 * 512 * 2 / 1e6  # y at least
    assert {(row.direction, row.mode) for row in rows} == {(d, m) for d in (FORWARD, BOTH) for m in (EAGER, GRAPH)}


@pytest.mark.gpu
def test_a_replay_reads_its_inputs_anew_on_a_gpu():
    x = torch.ones(8, device="cuda")
    replay = timing.capture(lambda: [2 * x])
    assert replay()[0].tolist() == [2.0] * 8
    x.fill_(3.0)
    assert replay()[0].tolist() == [6.0] * 8


@pytest.mark.gpu
def test_the_clock_of_a_gpu_runs_once():
    ran: list[int] = []
    assert timing.CudaClock()(lambda: ran.append(1)) >= 0
    assert ran == [1]
