"""`bench host`: the path of a CUDA device runs here whole, all but the kernels, in this commit and in another."""

from __future__ import annotations

import subprocess

import pytest

from alora_kernels.ops.dispatch import TRITON_INSTALLED
from bench import host
from bench.models.build import BUILD, Worker
from bench.report.rows import BOTH, FORWARD, ROOT, Row
from bench.report.sheet import read
from bench.report.targets import FUSED, HOST_TARGETS, RECORDED, judge

from .test_commands import invoke

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs triton")


@pytest.mark.parametrize("kind", host.LAYERS)
def test_a_layer_launches_what_two_launches_say(kind):
    worker = Worker({"layer": kind, "sizes": host.SIZES}, None, host.SCRIPT, host.UNSET)
    answers = {direction: worker.ask(direction) for direction in (FORWARD, RECORDED, BOTH)}
    assert all(answer["seconds"] > 0 for answer in answers.values())
    assert answers[FORWARD]["launches"] == answers[RECORDED]["launches"] == 2
    # dh and db, their sums, da (its sum, if its rows were cut), dx
    assert 2 + 4 <= answers[BOTH]["launches"] <= 2 + 5


def test_beside_another_commit(tmp_path):
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("no git checkout here")
    out = tmp_path / "host.csv"
    code, said = invoke(
        "host", "--build-venv", str(tmp_path / "venv"), "--build", "HEAD", "--repeats", "2", "--out", str(out)
    )
    assert code == 0, said
    rows = read(out, Row)
    assert {row.provider for row in rows} == {FUSED, BUILD} and all(row.timed for row in rows)
    assert all(judge(target, rows).measured for target in HOST_TARGETS)
    page = tmp_path / "page.md"
    page.write_text("<!-- bench-host:begin -->\n<!-- bench-host:end -->\n")
    code, said = invoke("plot", "--results", str(tmp_path), "--readme", str(page), "--docs", str(tmp_path / "no.md"))
    assert code == 0, said
    assert "| host PEFT layer | forward+backward | fused / today's build | ≤ 0.50 |" in page.read_text()
