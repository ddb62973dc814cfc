"""The command line: help, choices, errors that list what there is, a small run from end to end."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from bench import cpu, gpu
from bench.__main__ import app
from bench.report.rows import RESULTS, Row
from bench.report.sheet import read

SMALL = ["--m", "32", "--k", "16", "--n", "16", "--e", "4", "--r", "2", "--repeats", "2", "--threads", "1"]


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", done.output)
    return done.exit_code, " ".join(plain.split())


@pytest.mark.parametrize("command", [(), ("cpu",), ("gpu",), ("plot",), ("accuracy",)])
def test_help(command):
    code, said = invoke(*command, "--help")
    assert code == 0
    assert "Usage" in said


@pytest.mark.parametrize(
    ("arguments", "named", "alternatives"),
    [
        (("cpu", "--provider", "nobody"), "'nobody'", ("fused", "HydraLoRA", "PEFT LoRA task by task")),
        (("cpu", "--section", "nowhere"), "'nowhere'", ("layer", "decode", "training", "demo", "memory")),
        (("cpu", "--dtype", "float8"), "'float8'", ("float32", "bfloat16")),
        (("cpu", "--build", "nothing", "--build-venv", "x"), "no commit nothing", ("--build",)),
        (("gpu", "--provider", "nobody"), "'nobody'", ("fused:one_pass", "vLLM")),
        (("gpu", "--case", "nothing"), "'nothing'", ("decode 64", "tasks 1024")),
        (("gpu", "--mode", "lazy"), "'lazy'", ("eager", "cuda graph")),
    ],
)
def test_an_unknown_name_is_answered_with_those_there_are(arguments, named, alternatives):
    code, said = invoke(*arguments)
    assert code == 2
    assert "unknown" in said or "no c" in said
    for name in (named, *alternatives):
        assert name in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_other_commands_are_named():
    code, said = invoke("gpu")
    assert code == 1
    assert "no CUDA device" in said
    assert "bench cpu" in said
    assert "bench static" in said


def test_a_layer_from_end_to_end(tmp_path):
    out = tmp_path / "cpu.csv"
    code, said = invoke(
        *("cpu", "--section", "layer", "--provider", "fused", "--provider", "hoisted", "--dtype", "float32"),
        *(*SMALL, "--out", str(out)),
    )
    assert code == 0, said
    rows = read(out, Row)
    assert [(row.case, row.provider) for row in rows] == [
        ("layer soft", "fused"), ("layer soft", "hoisted"), ("layer task", "fused"), ("layer task", "hoisted")
    ]  # fmt: skip
    assert all(row.timed and row.m == 32 and row.e == 4 for row in rows)
    assert "4 rows written to" in said
    assert "hoisted / fused" not in said  # targets are of the usual layer


def test_a_layer_of_another_shape_is_kept_out_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = invoke("cpu", "--section", "layer", "--provider", "fused", "--dtype", "float32", *SMALL)
    assert code == 0, said
    assert len(read(tmp_path / "runs" / "bench-cpu.csv", Row)) == 2


def test_the_usual_layer_is_judged(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(cpu, "measure", lambda *args, **kwargs: told.update(kwargs))
    assert invoke("cpu", "--section", "layer", "--provider", "fused", "--dtype", "float32")[0] == 0
    assert told["out"] == RESULTS / "cpu.csv" and told["targets"] == cpu.CPU_TARGETS


def test_a_shape_that_cannot_be_is_refused(tmp_path):
    code, said = invoke("cpu", "--section", "layer", "--m", "100", "--out", str(tmp_path / "cpu.csv"))
    assert code == 2
    assert "m must be a multiple of 16" in said


def test_sections_choose_cases():
    shape = {"m": 32, "k": 8, "n": 8, "e": 2, "r": 2}
    names = [*cpu.LAYER, *cpu.DECODE]
    assert [w.row.case for w in cpu.works(["layer"], names, shape)] == ["layer soft", "layer task"]
    assert [w.row.case for w in cpu.works(["decode"], names, shape)] == ["decode 768", "decode 2048"]
    assert cpu.works(["training", "memory"], ["frozen"], shape) == []
    both = [
        (w.row.case, w.row.dtype) for w in cpu.works(["decode", "training"], [*names, *cpu.DEMO], shape, cpu.DTYPES)
    ]
    assert both[1:3] == [("decode 2048", "float32"), ("decode 768, bfloat16", "bfloat16")]
    assert both[-2:] == [("training step", "float32"), ("training step, bfloat16", "bfloat16")]


def test_gpu_cases_begin_with_the_plain_gemm():
    assert [w.row.case for w in gpu.works()][:3] == ["gemm 4096x4096", "gemm 4096->14336", "gemm 14336->4096"]
    assert {w.row.dtype for w in gpu.works()} == {"bfloat16"}
    assert gpu._case("decode 1", "task").device == "cuda"
