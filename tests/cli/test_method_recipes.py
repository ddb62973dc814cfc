"""`method:` and `budget:` of a recipe, end to end on a tiny random model: train, resume, save, judge again."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alora_kernels.adapters.method import METHODS, ROUTED, read_method
from alora_kernels.baselines.methods import parameters_of, trainable_parameters
from alora_kernels.recipes import train as steps
from alora_kernels.recipes.job import load
from alora_kernels.recipes.recipe import Recipe, load_recipe
from tests.support.cli import alora, recipe, refused
from tests.support.toyrows import write

WEIGHTS = "adapter_model.safetensors"
SMALL = {"num_experts": 2, "lora_dropout": 0.1, "warmup_steps": 0, "save_steps": 2}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def cells(output: str, task: str) -> list[str]:
    return next(line for line in output.splitlines() if line.startswith(f"│ {task}")).split("│")


def run(tmp_path: Path, jsonl: Path, method: str, **more: object) -> tuple[str, Path]:
    """Train by a method into a folder of its own."""
    config, output = recipe(tmp_path, jsonl, **{**SMALL, **more}), tmp_path / f"{method} {more}"
    out = alora("train", str(config), "--method", method, "--output", str(output))
    return out, output / "adapter"


@pytest.mark.parametrize("method", METHODS)
def test_train_again_resume_and_eval(tmp_path, jsonl, method):
    out, adapter = run(tmp_path, jsonl, method)
    assert re.search(rf"{METHODS[method]}: r=2, \S+ M parameters train", out)
    log = json.loads((adapter / "losses.json").read_text())
    losses = [{k: v for k, v in entry.items() if "loss" in k} for entry in log]
    assert len(losses) == 5 and all({"loss", "loss_even", "loss_odd"} <= set(entry) for entry in losses[:4])
    assert all(math.isfinite(v) for entry in losses for v in entry.values())

    folder = adapter.parent
    saved = sum(f.stat().st_size for f in (folder / "checkpoint-4").glob("*.safetensors"))
    assert saved < 1.5 * sum(f.stat().st_size for f in adapter.glob("*.safetensors"))  # what trains, not the base
    kept = weights(adapter)
    assert any(v.any() for name, v in kept.items() if "_B" in name)
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(folder / name)
    alora("train", str(tmp_path / "recipe.yaml"), "--method", method, "--output", str(folder), "--resume")
    resumed = weights(adapter)
    assert resumed.keys() == kept.keys()
    assert all(torch.equal(kept[name], resumed[name]) for name in kept)

    shutil.rmtree(folder)
    again, _ = run(tmp_path, jsonl, method)  # the same seed
    log_again = json.loads((adapter / "losses.json").read_text())
    assert [{k: v for k, v in entry.items() if "loss" in k} for entry in log_again][:4] == losses[:4]
    assert all(torch.equal(v, weights(adapter)[name]) for name, v in kept.items())
    assert cells(again, "even") == cells(out, "even")

    judged = alora("eval", str(adapter), "--base")
    for task in ("even", "odd"):
        assert cells(judged, task)[-2] == cells(out, task)[-2]
    assert METHODS[method] in judged and "base, untuned" in judged


def test_the_default_is_alora_as_before(tmp_path, jsonl):
    alora("train", recipe(tmp_path, jsonl, **SMALL))
    adapter = tmp_path / "run" / "adapter"
    assert {WEIGHTS, "adapter_config.json", "recipe.yaml", "losses.json"} <= {path.name for path in adapter.iterdir()}
    default = weights(adapter)
    _, named = run(tmp_path, jsonl, "alora")
    assert all(torch.equal(v, weights(named)[name]) for name, v in default.items())


def test_all_methods_see_the_same_rows(tmp_path, jsonl):
    config = load_recipe(recipe(tmp_path, jsonl, **SMALL))
    order = {}
    for method in METHODS:
        trainer = steps.trainer_for(load(config.instead(method=method)), save=False)
        trainer.model.train()
        batches = [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]
        order[method] = batches
        assert trainer.routed == (method in ROUTED)
        assert trainer.tasks == ("even", "odd")
    assert all(batches == order["alora"] for batches in order.values())


@pytest.mark.parametrize("rslora", [False, True])
def test_a_budget_of_parameters_gives_every_method_as_many(tmp_path, jsonl, rslora):
    config = load_recipe(recipe(tmp_path, jsonl, budget="parameters", r=16, use_rslora=rslora, num_experts=2))
    ranks = {}
    for method in METHODS:
        job = load(config.instead(method=method))
        count = trainable_parameters(job.model)
        ranks[method] = job.method.r
        one_more = abs(_size(job, method, job.method.r + 1) - job.alora_parameters)
        assert abs(count - job.alora_parameters) <= one_more
        assert abs(count / job.alora_parameters - 1) < 0.05
        s = job.method.alpha / (math.sqrt(job.method.r) if rslora else job.method.r)
        assert s == pytest.approx(16 / (4 if rslora else 16))  # the recipe's, whatever the rank
    assert ranks["alora"] == 16
    assert ranks["lora-per-task"] < 16 < ranks["lora"]


def _size(job: steps.Run, method: str, r: int) -> int:
    shapes = [(m.in_features, m.out_features) for m in job.model.modules() if hasattr(m, "lora_A")] or [
        (m.in_features, m.out_features) for m in job.model.modules() if hasattr(m, "asymlora_A")
    ]
    return parameters_of(method, r, shapes, tasks=2, num_experts=2)


def test_the_rank_chosen_is_printed_and_recorded(tmp_path, jsonl):
    out, adapter = run(tmp_path, jsonl, "lora", budget="parameters", r=4)
    method = read_method(adapter)
    assert method is not None and method.r > 4
    shown = re.search(r"LoRA: r=(\d+), \S+ M parameters train, (\S+) % of the \S+ M of ALoRA with r=4", out)
    assert shown and int(shown[1]) == method.r and 80 < float(shown[2]) < 120
    record = json.loads((adapter / "method.json").read_text())["record"]
    assert record["budget"] == "parameters"
    assert record["trainable_parameters"] == sum(v.numel() for v in weights(adapter).values())
    assert float(shown[2]) == pytest.approx(100 * record["trainable_parameters"] / record["alora_parameters"], abs=0.06)
    assert "even" in alora("eval", str(adapter))


def test_a_budget_too_small(tmp_path, jsonl):
    path = recipe(tmp_path, jsonl, budget="parameters", r=1, method="hydralora", num_experts=64)
    assert re.search(
        r"hydralora needs \d+ trainable .* r=1 and 2 tasks: give r of at least \d+", refused("train", str(path))
    )


def test_an_unknown_method_on_the_command_line_lists_the_known(tmp_path, jsonl):
    said = refused("train", str(recipe(tmp_path, jsonl)), "--method", "dora")
    assert all(method in said for method in METHODS)
    help_text = alora("train", "--help")
    assert all(method in " ".join(help_text.split()) for method in METHODS)


def test_routing_is_an_older_name():
    assert Recipe(tasks=("trec",)) == Recipe(tasks=("trec",), method="alora", routing="task")
    assert Recipe(tasks=("trec",), routing="soft") == Recipe(tasks=("trec",), method="alora-soft")
    assert Recipe(tasks=("trec",), routing="soft").instead(method="lora").routing is None


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_of_any_method_survives_saving_and_changes(tmp_path, method):
    first = Recipe(tasks=("trec",), method=method, budget="parameters")
    first.save(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == first
    assert first.instead(seed=1).method == method


def test_resume_finds_each_tasks_rows_by_its_name(tmp_path):
    for name, answers in (("math", ("yes", "no")), ("code", ("no", "yes")), ("law", ("yes", "no"))):
        rows = ({"prompt": f"{name} {i}?", "answer": answers[i % 2]} for i in range(40))
        write(tmp_path / f"{name}.jsonl", rows)

    def train(*tasks: str) -> list[str]:
        names = ", ".join(f"{task}.jsonl" for task in tasks)
        return ["train", str(recipe(tmp_path, tmp_path / "none", **SMALL, tasks=f"[{names}]"))]

    alora(*train("math", "code"))
    adapter = tmp_path / "run" / "adapter"
    before, config = weights(adapter), (adapter / "adapter_config.json").read_text()
    assert json.loads(config)["tasks"] == ["math", "code"]
    shutil.rmtree(adapter)
    said = refused(*train("math", "law"), "--resume")
    assert all(task in said for task in ("math", "code", "law"))
    alora(*train("code", "math"), "--resume")  # the last checkpoint is the end: nothing is left to train
    assert json.loads((adapter / "adapter_config.json").read_text())["tasks"] == ["math", "code"]
    after = weights(adapter)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    shutil.rmtree(tmp_path / "run")
    alora(*train("code", "math"))  # the order of another run is its own
    assert json.loads((adapter / "adapter_config.json").read_text())["tasks"] == ["code", "math"]
