"""`alora analyze`: what it prints, what it writes, how it fails."""

from __future__ import annotations

import csv
import html
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

from alora_kernels.cli import analyze as command

from ..analysis.adapters import UP, Q, randn
from ..support.adapters import alora, lora
from ..support.cli import alora as command_line

run = partial(command_line, "analyze")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    modules = [name.format(n) for n in range(2) for name in (Q, UP)]
    stack = torch.stack([torch.eye(8)[:2], torch.eye(8)[:2], torch.eye(8)[2:4]])
    return alora(tmp_path / "ad[red]apter", ["math", "code", "[red]law"], dict.fromkeys(modules, stack),
                 {m: randn(6, 2) for m in modules})  # fmt: skip


def test_help_is_complete():
    text = run("--help")
    assert all(word in text for word in ("--out", "--init", "--base", "--no-figures", "Examples", "report.html"))
    assert "Compare adapters" in text


def test_tables_files_and_figures(adapter: Path, tmp_path: Path):
    text = run(adapter, "--out", tmp_path / "out")
    assert "math – code" in text and "1.000 ± 0.000" in text and "subspace overlap of A (chance 0.250)" in text
    assert "[red]law" in text and "effective rank of s B A" in text
    assert "- Tasks of one ALoRA folder share one B" in text and "not compared: B, math with code" in text
    assert text.rstrip().endswith(f"report: {tmp_path / 'out' / 'report.html'}")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"similarity.csv", "changes.csv", "norms.csv", "not_compared.csv", "report.html", "figures"}
    page = (tmp_path / "out" / "report.html").read_text()
    command = shlex.join(["alora", "analyze", str(adapter), "--out", str(tmp_path / "out")])
    assert command in html.unescape(page)
    assert page.count("<img ") == len(list((tmp_path / "out" / "figures").iterdir())) > 4


def test_without_figures(adapter: Path, tmp_path: Path):
    run(adapter, "--no-figures", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "figures").exists()
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()


def test_start_and_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from alora_kernels import data

    model, _ = data.load_model("tiny-random")
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("q_proj"))
    n, k = layer.weight.shape
    start = lora(tmp_path / "start", {name: randn(2, k)}, {name: torch.zeros(n, 2)})
    end = lora(tmp_path / "end", {name: 2 * randn(2, k)}, {name: randn(n, 2)})
    text = run(end, "--init", start, "--base", "tiny-random", "--out", tmp_path / "out", "--no-figures")
    assert "from start" in text and "from W0" in text
    rows = list(csv.DictReader((tmp_path / "out" / "changes.csv").open()))
    (value,) = [r["value"] for r in rows if (r["part"], r["measure"]) == ("A", "relative_magnitude")]
    assert float(value) == pytest.approx(1.0)
    assert {r["unit2"] for r in rows} == {"start", "W0"}


def test_bad_input_is_one_line(adapter: Path, tmp_path: Path):
    assert "error: " in run(tmp_path / "nowhere", code=2)
    assert "none of what can be looked into" in run(tmp_path, "--out", tmp_path / "out", code=2)
    assert "given twice" in run(adapter, adapter, "--out", tmp_path / "out", code=2)
    (tmp_path / "file").write_text("")
    assert "is a file" in run(adapter, "--out", tmp_path / "file", code=2)
    other = lora(tmp_path / "other", {"up": randn(2, 4)}, {"up": randn(3, 2)})
    assert "start of none of the units" in run(adapter, "--init", other, "--out", tmp_path / "out", code=2)
    assert "could not load model" in run(adapter, "--base", tmp_path / "no", "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_many_reasons_and_units_are_cut(tmp_path: Path):
    folders = [lora(tmp_path / f"l{r}", {UP.format(0): randn(r, 8)}, {UP.format(0): randn(6, r)}) for r in range(1, 8)]
    text = run(*folders, "--out", tmp_path / "out", "--no-figures")
    assert "9 pairs in between" in text
    assert f"more reasons are in {tmp_path / 'out' / 'not_compared.csv'}" in text


def test_a_bar_appears_only_when_it_takes_long(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "comparing" not in run(adapter, "--out", tmp_path / "out", "--no-figures")
    monkeypatch.setattr(command, "PATIENCE", -1.0)
    assert "comparing" in run(adapter, "--out", tmp_path / "out", "--no-figures")
