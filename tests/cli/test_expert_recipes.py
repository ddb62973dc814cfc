"""`target_parameters:` of a recipe on a small mixture with its router's own loss: train, resume, go on, judge, ask."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alora_kernels import data
from alora_kernels.adapters.reader import read_adapter
from alora_kernels.recipes import train as steps
from alora_kernels.recipes.job import load
from alora_kernels.recipes.recipe import load_recipe
from tests.cli.test_train_processes import free_port, launched
from tests.support.cli import alora, recipe, refused
from tests.support.mixtures import mixture
from tests.support.toyrows import write

EXPERTS = {"target_parameters": "all-experts", "learning_rate": 0.05, "warmup_steps": 0, "save_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mixture that balances its experts, and a tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("mixture"), data.load_tokenizer("tiny-random")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "output_router_logits": True}
    mixture(**sizes, **ids, router_aux_loss_coef=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_train_resume_eval_and_generate(tmp_path, jsonl, base):
    path = recipe(tmp_path, jsonl, model=base, **EXPERTS, experts_A="each", target_modules="null")
    out = alora("train", path)
    folder = tmp_path / "run" / "adapter"
    kept = read_adapter(folder)
    assert len(kept.b) == 4 and all("mlp.experts." in name for name in kept.b)
    assert {tuple(a.shape) for a in kept.matrices("even").values()} == {(4, 2, 32), (4, 2, 24)}
    trained = json.loads((folder / "method.json").read_text())["record"]["trainable_parameters"]
    assert trained == 2 * (2 * 4 * 2 * (32 + 24) + 4 * 2 * (48 + 32)) and f"{trained / 1e6:.3g} M" in out
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    alora("train", path, "--resume")
    again = read_adapter(folder)
    assert all(torch.equal(kept.b[name], again.b[name]) for name in kept.b)
    judged = alora("eval", folder, "--base")
    assert "base, untuned" in judged and "even" in judged
    assert alora("generate", folder, "1", "--task", "even", "--task", "odd", "--max-tokens", "2")


@pytest.mark.parametrize("given", ["all-experts", "[experts.down_proj, gate_up_proj]", "null"])
def test_training_goes_on_with_the_experts_of_an_adapter(tmp_path, jsonl, base, given):
    alora("train", recipe(tmp_path, jsonl, model=base, **EXPERTS))
    rows = ({"prompt": f"Is {i} new?", "answer": "yes" if i % 2 else "no"} for i in range(20))
    tasks = f"[{{name: parity, source: {jsonl}}}, {{name: new, source: {write(tmp_path / 'new.jsonl', rows)}}}]"
    first = (tmp_path / "run" / "adapter").rename(tmp_path / "first")
    more = EXPERTS | {"target_parameters": given, "tasks": tasks, "adapter": first, "train_tasks": "[new]"}
    path = recipe(tmp_path, jsonl, model=base, **more, overwrite=True)
    alora("train", path)
    before, after = read_adapter(first), read_adapter(tmp_path / "run" / "adapter")
    assert after.tasks == ("even", "odd", "new") and all(torch.equal(before.b[name], after.b[name]) for name in after.b)
    assert sum("experts" in name for name in after.b) == 4
    for key, value in (("target_parameters", "[down_proj]"), ("experts_A", "each")):
        path = recipe(tmp_path, jsonl, model=base, **more | {"target_parameters": "all-experts", key: value})
        assert f"{key}: " in (said := refused("train", path, "--overwrite")) and "keeps its own" in said


def losses(path: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    trainer = steps.trainer_for(load(load_recipe(path).instead(**changes)), save=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "asymlora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    trainer.train()
    return trainer, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_packed_rows_and_logits_of_labels_alone_train_alike(tmp_path, jsonl, base, monkeypatch):
    """Packed rows have no padding, which a mixture's balancing loss counts by the mask."""
    path = recipe(tmp_path, jsonl, model=base, **EXPERTS | {"save_steps": 0})
    _, right = losses(path, packing=False)
    trainer, packed = losses(path, packing=True)
    assert trainer.packing.padded_because == "" and trainer._losses[True].head is not None
    monkeypatch.setattr("alora_kernels.training.loss.find_head", lambda model: (_ for _ in ()).throw(ValueError("no")))
    _, whole = losses(path, packing=False)
    assert any("experts" in name for name in right)
    for name, parameter in right.items():
        torch.testing.assert_close(packed[name], parameter, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(whole[name], parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(tmp_path, jsonl, base, parallel):
    """Without the balancing loss, which each forward pass takes of its own rows."""
    plain = shutil.copytree(base, tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"output_router_logits": False}))
    more = EXPERTS | {"save_steps": 0, "packing": "false", "model": plain}
    path = recipe(tmp_path, jsonl, **more)
    alora("train", path, "--output", tmp_path / "one")
    path = recipe(tmp_path, jsonl, **more, parallel=parallel)
    start = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    launched(*start, "-m", "alora_kernels", "train", path, "--output", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and any("experts" in name for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
