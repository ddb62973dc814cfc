"""`alora train` by torchrun, two nodes of one machine, and by accelerate launch: the adapter folder of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alora_kernels import precision
from alora_kernels.recipes import job as jobs
from alora_kernels.recipes import train
from alora_kernels.recipes.job import load
from alora_kernels.recipes.recipe import load_recipe

from ..support.processes import ROOT

RECIPE = """
tasks:
  - {name: sign, source: sign.jsonl, prompt: "{text} ->", answer: "{label}"}
  - {name: size, source: size.jsonl, prompt: "{text} ->", answer: "{label}"}
model: tiny-random
dtype: float32
target_modules: [q_proj, down_proj]
steps: 4
batch_size: 6
test_size: 6
save_steps: 2
"""
WORDS = {"sign": ("plus", "minus"), "size": ("big", "small")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    for name, words in WORDS.items():
        rows = [{"text": f"{name} of {i}", "label": words[i % 2]} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "ddp.yaml").write_text(RECIPE)
    (folder / "fsdp.yaml").write_text(RECIPE + "parallel: fsdp\n")
    return folder


@pytest.fixture(scope="module")
def one(recipe: Path) -> Path:
    return train.run(load_recipe(recipe / "ddp.yaml").instead(output=str(recipe / "one")))


def launched(*command: str | Path, **variables: str) -> str:
    python = {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **python, **variables},
        cwd=ROOT, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def ordered(file: Path) -> dict[str, Any]:
    """What a file holds; PEFT's names of modules are a set, written in any order."""
    held = json.loads(file.read_text())
    return held | ({"target_modules": sorted(held["target_modules"])} if "target_modules" in held else {})


def assert_is_that_of(one: Path, adapter: Path, printed: str) -> None:
    """The same files and adapter; printed once."""
    assert {file.name for file in adapter.iterdir()} == {file.name for file in one.iterdir()}
    got, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, one))
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=5e-6, msg=name)
    for file in ("adapter_config.json", "adapter_tasks.json", "method.json"):
        assert ordered(adapter / file) == ordered(one / file)
    logs, known = (json.loads((folder / "losses.json").read_text()) for folder in (adapter, one))
    for got, wanted in zip(logs[:-1], known[:-1], strict=True):
        assert got == pytest.approx(wanted, rel=1e-3)
    assert printed.count("adapter saved") == printed.count("step    4") == printed.count("4/4 steps") == 1


@pytest.mark.slow
def test_two_nodes_by_torchrun(recipe, one):
    text = launched("bash", "examples/two_nodes.sh", recipe / "ddp.yaml", "--output", recipe / "two", PORT=free_port())
    assert_is_that_of(one, recipe / "two" / train.ADAPTER, text)


@pytest.mark.slow
def test_two_processes_by_accelerate_launch(recipe, one):
    start = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    start += ("--main_process_port", free_port(), "-m", "alora_kernels.cli", "train")
    text = launched(*start, recipe / "fsdp.yaml", "--output", recipe / "sharded")
    assert_is_that_of(one, recipe / "sharded" / train.ADAPTER, text)


def test_what_cannot_be_shared_out_is_refused_before_anything_is_loaded(recipe, monkeypatch):
    with pytest.raises(ValueError, match=r"parallel: fsdp shards .* torchrun"):
        train.run(load_recipe(recipe / "fsdp.yaml").instead(output=str(recipe / "none")))
    with pytest.raises(ValueError, match="conflict_steps"):
        load_recipe(recipe / "fsdp.yaml").instead(conflict_steps=2)
    monkeypatch.setattr(train, "PartialState", lambda cpu: Processes())
    with pytest.raises(ValueError, match="6 rows of a step cannot be dealt evenly to 4"):
        train.run(load_recipe(recipe / "ddp.yaml").instead(output=str(recipe / "none")))
    assert not (recipe / "none").exists()


def test_what_auto_becomes_is_chosen_by_the_first_process(recipe, monkeypatch):
    first = precision.explain("cpu", "bfloat16", "")
    monkeypatch.setattr(jobs, "broadcast_object_list", lambda mine: [first])
    job = load(load_recipe(recipe / "ddp.yaml"))
    assert job.recipe.dtype == "bfloat16" == str(job.model.dtype).removeprefix("torch.")


class Processes:
    """Four."""

    num_processes, distributed_type = 4, None
