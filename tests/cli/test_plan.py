"""`alora plan`: what it predicts beside what autograd keeps in a real step, and what it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    TrainingArguments,
)
from typer.testing import CliRunner

from alora_kernels import data
from alora_kernels.baselines.methods import adapt
from alora_kernels.cli.app import app
from alora_kernels.recipes import plan
from alora_kernels.recipes.recipe import Recipe
from alora_kernels.training import ALoRATrainer
from tests.support.cli import alora, recipe, refused
from tests.support.toyrows import write

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 300, "num_hidden_layers": 3, "max_position_embeddings": 512}  # fmt: skip
LLAMA = LlamaConfig(**SIZES)
EXPERTS = {"packing": False, "target_parameters": "all-experts"}
MIXTURE = Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96)
GPT = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=300, resid_pdrop=0, attn_pdrop=0)
EQUAL, MIXED = [64] * 4, [64, 30, 50, 12]


def settings(folder: Path, config: PretrainedConfig, lengths: list[int], **more) -> tuple[Recipe, plan.Rows]:
    config.save_pretrained(folder)
    rows = plan.Rows(
        ("t",), len(lengths), max(lengths), sum(lengths) / len(lengths), float(len(set(lengths)) > 1), 0.5, 1, 1
    )
    given = {"tasks": ("spam",), "model": str(folder), "batch_size": len(lengths), "dtype": "float32"} | more
    return Recipe(max_length=max(lengths), **given), rows


def measured(config: PretrainedConfig, lengths: list[int], recipe: Recipe, folder: Path) -> int:
    """Bytes that the forward of a real step keeps beside the weights."""
    torch.manual_seed(0)
    dtype = getattr(torch, recipe.dtype)
    model = adapt(AutoModelForCausalLM.from_config(config, dtype=dtype), recipe.adapters(("t",)))
    rows = []
    for length in lengths:
        ids = torch.randint(3, 300, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :], "task": "t"})
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=len(lengths), use_cpu=True, report_to="none",
        gradient_checkpointing=recipe.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = ALoRATrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), padding_free=recipe.packing)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, found, compute_loss = {}, [], trainer.compute_loss

    def keep(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    def loss(*args, **kwargs):
        kept.clear()  # the first step proves things
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = compute_loss(*args, **kwargs)
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        kept.clear()
        return out

    trainer.compute_loss = loss
    trainer.train()
    return found[-1]


@pytest.mark.parametrize(
    ("config", "lengths", "more"),
    [
        (LLAMA, EQUAL, {"packing": False}),
        (LLAMA, EQUAL, {"packing": False, "dtype": "bfloat16", "r": 16}),
        (LLAMA, MIXED, {"packing": False}),
        (LLAMA, EQUAL, {"packing": False, "gradient_checkpointing": True}),
        (LLAMA, [96], {"packing": False}),
        (LLAMA, EQUAL, {"packing": False, "method": "lora-per-task"}),
        (Qwen3Config(**SIZES, head_dim=16), [48, 48], {"packing": False}),
        (GPT, [64], {"packing": False}),
        (MIXTURE, EQUAL, EXPERTS),
        (MIXTURE, EQUAL, EXPERTS | {"target_modules": None, "experts_A": "each", "dtype": "bfloat16"}),
        (MIXTURE, EQUAL, EXPERTS | {"target_parameters": [f"layers.{i}.mlp.experts.down_proj" for i in range(3)]}),
    ],
)  # fmt: skip
def test_what_is_kept_for_the_backward_is_what_autograd_keeps(tmp_path, config, lengths, more):
    chosen, rows = settings(tmp_path, config, lengths, **more)
    facts = plan.facts_of(chosen, rows, "cpu")
    bare = replace(facts, passing=0)
    found = plan.parts(bare, chosen)["activations"] + sum(lengths) / 2 * facts.width * facts.size
    if chosen.gradient_checkpointing:  # one layer at a time comes later
        found -= facts.saved * len(lengths)
    assert found == pytest.approx(measured(config, lengths, chosen, tmp_path / "run"), rel=0.04)


def counted(chosen: Recipe, config: PretrainedConfig) -> tuple[plan.Facts, int]:
    facts = plan.facts_of(chosen, None)
    model = adapt(AutoModelForCausalLM.from_config(config), chosen.adapters(("spam",)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts.adapter == trained and facts.linear + facts.other + trained == model.num_parameters()
    return facts, trained


@pytest.mark.parametrize("sharing", [("shared", "each"), ("each", "each"), ("shared", "shared"), ("each", "shared")])
@pytest.mark.parametrize("modules", ["all-linear", None])
def test_adapters_of_experts_are_counted(tmp_path, sharing, modules):
    more = {"target_modules": modules, "experts_A": sharing[0], "experts_B": sharing[1]}
    counted(settings(tmp_path, MIXTURE, [64], **EXPERTS, **more)[0], MIXTURE)


def test_parts_of_a_plan_are_what_their_settings_say(tmp_path):
    chosen, _ = settings(tmp_path, LLAMA, [64] * 8)
    facts, trained = counted(chosen, LLAMA)
    whole = plan.parts(facts, chosen)
    assert whole["weights"] == 4 * (facts.linear + facts.other) and whole["optimiser"] == 8 * trained
    halves = plan.parts(facts, chosen.instead(gradient_accumulation=2))
    assert halves["activations"] == pytest.approx(whole["activations"] / 2)
    assert plan.parts(facts, chosen, processes=2) == halves
    assert plan.parts(facts, chosen.instead(optimizer="adamw_8bit"))["optimiser"] < whole["optimiser"] / 3
    bits = plan.parts(facts, chosen.instead(load_in="4bit"))["weights"] - 4 * facts.other
    assert 0.5 * facts.linear < bits < 0.55 * facts.linear
    assert plan.parts(facts, chosen.instead(gradient_checkpointing=True))["activations"] < whole["activations"]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with the config of Llama 3.1 8B, and no weights."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, **sizes)
    config.save_pretrained(tmp_path / "8b")
    return tmp_path / "8b"


def as_json(*args: object) -> dict:
    result = CliRunner().invoke(app, ["plan", *map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_8b_model_from_its_config_alone(tmp_path, large, jsonl):
    example = (Path(__file__).parents[2] / "examples" / "chat_8b.yaml").read_text()
    path = tmp_path / "chat.yaml"
    path.write_text(re.sub("^model: [^ ]*", "model: 8b", example, flags=re.MULTILINE))
    found = as_json(path)
    assert found["parameters"] == 8_030_261_248 and found["data"] is None and found["rows_at_once"] == 4
    assert 5e9 < found["bytes"]["weights"] < 6e9
    assert found["total"] == pytest.approx(sum(found["bytes"].values()), abs=10) and 8e9 < found["total"] < 20e9
    assert found["fits"] == {"24 GB": True, "48 GB": True, "80 GB": True} and found["changes"] == []

    path = recipe(tmp_path, jsonl, model="8b", dtype="bfloat16", max_length=1024, batch_size=32)
    out = alora("plan", path, "--memory", "12 GB")
    assert "PREDICTED" in out and "12 GB: does not fit" in out
    assert "taken to be as long as max_length" in out
    changes = ["gradient_checkpointing: true", "gradient_accumulation: 32", "max_length: 512", "load_in: 4bit"]
    assert [line.split("  ->")[0].strip() for line in out.splitlines() if "->" in line] == changes
    totals = [float(total) for total in re.findall(r"->  ([\d.]+) GB", out)]
    assert totals == sorted(totals, reverse=True) and totals[-1] < 12


def test_rows_that_are_at_hand_are_counted_and_their_lengths_taken(tmp_path, jsonl):
    rows = ({"prompt": "n" * (10 + i), "answer": "yes" if i % 2 else "no"} for i in range(50))
    path = recipe(tmp_path, write(tmp_path / "n.jsonl", rows), steps=7, max_length=200)
    found = as_json(path)
    assert found["data"]["count"] == 40 and found["data"]["epoch"] == 5 and found["data"]["steps"] == 7
    assert found["tokens_of_a_row"] == found["data"]["longest"] < 200
    out = alora("plan", path)
    assert "40 training rows" in out and "5 steps an epoch; 7 steps in all" in out


def test_what_cannot_be_planned_is_told_with_its_remedy(tmp_path, jsonl):
    path = recipe(tmp_path, jsonl, model="meta-llama/Llama-3.1-8B", max_length=64)
    assert "a folder that holds the model's config.json will do" in refused("plan", path)
    path = recipe(tmp_path, jsonl)
    assert "--memory must be a size in GB, such as 24GB" in refused("plan", path, "--memory", "much")
    assert "cannot be dealt evenly to 3 processes" in refused("plan", path, "--processes", "3")


def test_the_peak_is_told_after_training_beside_the_prediction(tmp_path, jsonl, monkeypatch):
    assert "peak of memory: " in alora("train", recipe(tmp_path, jsonl, steps=1))
    monkeypatch.setattr(plan, "TOY", 0)
    assert "; PREDICTED " in alora("train", recipe(tmp_path, jsonl, steps=1), "--overwrite")
    monkeypatch.setattr(plan, "_run", lambda *_: [].pop())
    out = alora("train", recipe(tmp_path, jsonl, steps=1), "--overwrite")
    assert "not predicted: tiny-random: this kind of model cannot be run without its numbers" in out
    assert "adapter saved" in out


def test_a_length_that_nobody_knows_is_assumed_and_said(monkeypatch):
    """The context of a model may be 131,072 tokens, which no row has."""
    config = data.load_config("tiny-random")
    config.max_position_embeddings = 1 << 17
    monkeypatch.setattr(data, "load_config", lambda name: config)
    found = plan.plan(Recipe(tasks=("nobody/nothing",), model="tiny-random", batch_size=2))
    assert found["tokens_of_a_row"] == 2048 and found["length_assumed"]
    assert not plan.plan(Recipe(tasks=("nobody/nothing",), model="tiny-random", max_length=64))["length_assumed"]
