"""`dtype:` of a recipe: what auto becomes is said, saved and used again; adapters are float32 over any base."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from safetensors.torch import load_file

from alora_kernels import precision
from alora_kernels.adapters.method import METHODS
from alora_kernels.baselines.methods import trained
from alora_kernels.precision import Choice
from alora_kernels.recipes import train
from alora_kernels.recipes.job import load
from alora_kernels.recipes.judge import judge
from alora_kernels.recipes.recipe import load_recipe
from alora_kernels.training import evaluate
from tests.support.cli import alora, recipe, refused


def dtypes(tensors) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_float32_over_a_bfloat16_base(tmp_path, jsonl, method):
    config = load_recipe(recipe(tmp_path, jsonl, dtype="bfloat16", method=method, steps=2, num_experts=2))
    job = load(config)
    trainer = train.trainer_for(job, save=False)
    trainer.train()
    own = trained(job.model)
    assert dtypes(own.values()) == {torch.float32}
    assert dtypes(p for p in job.model.parameters() if not p.requires_grad) == {torch.bfloat16}
    assert dtypes(p.grad for p in own.values() if p.grad is not None) <= {torch.float32}
    train.save(job, tmp_path / "adapter", trainer)
    (path,) = (tmp_path / "adapter").glob("*.safetensors")
    assert dtypes(load_file(path).values()) == {torch.float32}

    again = load(load_recipe(tmp_path / "adapter" / "recipe.yaml"), tmp_path / "adapter")
    loaded = dict(again.model.named_parameters())
    assert all(torch.equal(p, loaded[name]) and loaded[name].dtype == p.dtype for name, p in own.items())
    assert again.model.dtype == torch.bfloat16
    assert judge(again, "x") == judge(job, "x")


def test_what_auto_became_is_said_saved_and_evaluated_in(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(precision, "_automatic", lambda place: Choice(torch.bfloat16, "this test says so"))
    out = alora("train", recipe(tmp_path, jsonl, dtype="auto", steps=2))
    assert "base in bfloat16 (this test says so)" in out
    adapter = tmp_path / "run" / "adapter"
    assert load_recipe(adapter / "recipe.yaml").dtype == "bfloat16"
    monkeypatch.setattr(precision, "_automatic", lambda place: Choice(torch.float32, "another machine"))
    assert "base in bfloat16 (as trained" in alora("eval", adapter)
    assert "base in float32 (another machine)" in alora("eval", adapter, "--dtype", "auto")


def test_an_adapter_of_before_the_key_is_judged_in_float32(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(precision, "_automatic", lambda place: pytest.fail("it was trained in float32"))
    alora("train", recipe(tmp_path, jsonl, steps=1))
    saved = tmp_path / "run" / "adapter" / "recipe.yaml"
    saved.write_text("".join(line for line in saved.read_text().splitlines(True) if not line.startswith("dtype:")))
    assert "base in float32" in alora("eval", saved.parent)


def test_the_command_line_goes_before_the_recipe(tmp_path, jsonl):
    assert "base in bfloat16" in alora("train", recipe(tmp_path, jsonl, steps=1), "--dtype", "bfloat16")
    assert "--dtype must be one of" in " ".join(refused("train", recipe(tmp_path, jsonl), "--dtype", "float16").split())
    said = " ".join(refused("train", recipe(tmp_path, jsonl, dtype="fp16")).split())
    assert "dtype: must be one of auto, float32, bfloat16, got 'fp16'; float16 is for serving" in said


def test_gradient_conflicts_over_a_bfloat16_base(tmp_path, jsonl):
    alora("train", recipe(tmp_path, jsonl, dtype="bfloat16", steps=2, conflict_steps=2))
    with (tmp_path / "run" / "conflicts.csv").open() as file:
        norms = [float(row["norm"]) for row in csv.DictReader(file)]
    assert any(norms) and all(map(math.isfinite, norms))


def test_likelihoods_over_a_bfloat16_base_are_float32(tmp_path, jsonl, monkeypatch):
    seen = []
    learn = evaluate.Question.learn
    monkeypatch.setattr(evaluate.Question, "learn", lambda self, log_p: seen.append(log_p.dtype) or learn(self, log_p))
    judge(load(load_recipe(recipe(tmp_path, jsonl, dtype="bfloat16"))), "x")
    assert set(seen) == {torch.float32}
