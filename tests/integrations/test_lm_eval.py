"""One of our tasks in the harness, and `alora lm-eval`: every number is the model's own under `route`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from alora_kernels import route

from ..support.adapters import alora_folder, lora_folder, tiny_base
from ..support.cli import alora, refused
from ..support.harness import PROMPTS, answers_of, harness  # noqa: F401

TASKS = ("math", "code")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return alora_folder(tmp_path / "adapter", tiny_base()[0], TASKS)


def loaded(folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny_base()[0], str(folder)).eval()


def by_hand(model: Any, task: int | None) -> list[float]:
    """In float64, a row at a time; None is a model whose adapters are off."""
    model = model.double()
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt[:-1]])
            if task is None:
                with model.disable_adapter():
                    rows.append(model(ids).logits)
            else:
                with route([task]):
                    rows.append(model(ids).logits)
    return answers_of(torch.cat(rows))


def test_every_call_of_the_harness_is_of_the_task(harness, adapter):  # noqa: F811
    from alora_kernels.integrations.lm_eval import ALoRALM

    model, found, texts = loaded(adapter), {}, {}
    for task in (*TASKS, "__base__", 1):
        lm = ALoRALM(model, task=task)
        found[task], texts[task] = lm.loglikelihood(), lm.generate()
    for task, i in (("math", 0), ("code", 1), (1, 1), ("__base__", None)):
        assert found[task] == pytest.approx(by_hand(loaded(adapter), i), abs=1e-5), task
    assert abs(found["math"][0] - found["code"][0]) > 1e-3 < abs(found["math"][0] - found["__base__"][0])
    for task, i in (("math", 0), ("code", 1)):
        with route([i]):
            alone = [model.generate(torch.tensor([p]), max_length=9, do_sample=False)[0].tolist() for p in PROMPTS]
        assert texts[task] == alone
    assert texts["math"] != texts["code"]


def test_a_task_that_is_missing_unknown_or_too_much_is_refused(harness, adapter, tmp_path):  # noqa: F811
    from alora_kernels.integrations.lm_eval import ALoRALM

    model = loaded(adapter)
    with pytest.raises(ValueError, match="several tasks: give task= one of math, code or __base__"):
        ALoRALM(model)
    with pytest.raises(ValueError, match="unknown task 'law'"):
        ALoRALM(model, task="law")
    plain = loaded(lora_folder(tmp_path / "lora", tiny_base()[0]))
    with pytest.raises(ValueError, match="no tasks to choose from"):
        ALoRALM(plain, task="math")
    assert ALoRALM(plain).loglikelihood() == pytest.approx(answers_of(plain(torch.tensor(PROMPTS)[:, :-1]).logits))


def test_the_command_judges_each_task_and_the_base(harness, adapter, tmp_path):  # noqa: F811
    out = tmp_path / "out.json"
    text = alora("lm-eval", adapter, "--tasks", "one,two", "--include-path", tmp_path, "--limit", 7, "--dtype",
                 "float32", "--out", out)  # fmt: skip
    content = json.loads(out.read_text())
    assert list(content["results"]) == ["base", *TASKS] and content["lm_eval"] == "0.0-stub"
    assert (content["model"], content["dtype"], content["limit"]) == ("tiny-random", "float32", 7)
    for name, task in (("base", None), ("math", 0), ("code", 1)):
        numbers = content["results"][name]["two"]
        assert numbers["folder"] == str(tmp_path) and numbers["limit"] == 7
        wanted = by_hand(loaded(adapter), task)
        assert [numbers["first,none"], numbers["second,none"]] == pytest.approx(wanted, abs=1e-5)
        assert f"{wanted[0]:.4f}" in text
    assert "stderr" not in text and "sample_len" not in text


def test_the_command_takes_some_tasks_and_adapters_without_any(harness, adapter, tmp_path):  # noqa: F811
    out = tmp_path / "out.json"
    alora("lm-eval", adapter, "--tasks", "one", "--only", "code", "--no-base", "--out", out)
    assert list(json.loads(out.read_text())["results"]) == ["code"]
    assert "unknown task 'law': valid tasks are math, code" in refused(
        "lm-eval", adapter, "--tasks", "one", "--only", "law"
    )
    lora = lora_folder(tmp_path / "stock", tiny_base()[0])
    alora("lm-eval", lora, "--tasks", "one", "--out", out)
    found = json.loads(out.read_text())["results"]
    assert list(found) == ["base", "stock"] and found["base"] != found["stock"]
    assert "'nosuch' is not a registered task" in refused("lm-eval", lora, "--tasks", "one,nosuch")
    assert "does not exist" in refused("lm-eval", lora, "--tasks", "one", "--include-path", tmp_path / "gone")
    assert "no tasks to choose from" in refused("lm-eval", lora, "--tasks", "one", "--only", "math")
    nameless = alora_folder(tmp_path / "nameless", tiny_base()[0], TASKS, base_name="")
    assert "give it as --model" in refused("lm-eval", nameless, "--tasks", "one")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed here")
def test_without_the_harness_the_command_says_what_to_install(adapter):
    assert "pip install -e '.[lm-eval]'" in refused("lm-eval", adapter, "--tasks", "arc_easy")
