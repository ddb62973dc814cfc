"""Every example runs from its `main()`, and fits on a page."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from ..support.toyrows import need_data

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda f: f.stem)
def test_it_fits_on_a_page_and_has_a_main(file):
    text = file.read_text()
    assert len(text.splitlines()) < 60
    assert "\ndef main(" in text


def test_drop_in_learns_both_tasks():
    accuracy = load("drop_in").main(steps=150)
    assert min(accuracy.values()) > 0.9  # chance is 0.5, and one shared answer is wrong for one of them


def test_multitask_peft(tmp_path):
    need_data("trec", "bbc")
    metrics = load("multitask_peft").main(model="tiny-random", steps=2, batch_size=8, output=str(tmp_path))
    assert {f"eval_accuracy_{task}" for task in ("trec", "movie", "spam", "bbc")} <= set(metrics)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_soft_routing(tmp_path, monkeypatch):
    need_data("trec", "bbc")
    monkeypatch.chdir(tmp_path)
    gates = load("soft_routing").main(model="tiny-random", steps=2, batch_size=4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2))


def test_accelerate_lora(tmp_path):
    need_data("trec", "bbc")
    result = load("accelerate_lora").main(model="tiny-random", steps=2, batch_size=4, output=str(tmp_path))
    (loss, _, kept), (stock_loss, _, stock_kept) = result["accelerated"], result["PEFT"]
    assert abs(loss - stock_loss) < 0.1  # other dropout masks
    assert kept < stock_kept
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_experts_learn_both_tasks_and_stock_peft_loads_them(tmp_path):
    losses = load("experts").main(steps=80, output=str(tmp_path))
    assert losses[-1] < math.log(59) < losses[0]  # 59 tokens to guess among
    for task in ("next", "before"):
        saved = load_file(tmp_path / "stock" / task / "adapter_model.safetensors")
        assert {key.rpartition(".lora_")[0].split("mlp.")[1] for key in saved} == {"experts", "experts.base_layer"}


@pytest.mark.parametrize("name", ["trl_sft", "trl_dpo", "trl_kto", "trl_reward", "trl_grpo"])
def test_trainers_of_trl(tmp_path, name):
    pytest.importorskip("trl")
    need_data("trec")  # whose package has the tokenizer
    history = load(name).main(model="tiny-random", steps=2, output=str(tmp_path))
    assert all(math.isfinite(entry["grad_norm"]) and entry["grad_norm"] > 0 for entry in history[:2])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(t.abs().max() > 0 for key, t in saved.items() if "asymlora_B" in key)
    assert {len(t) for key, t in saved.items() if "asymlora_A" in key} == {2}
