"""The walk of docs/own_data.md at tiny size: train, kill, resume, judge, add a task, serve, ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("uvicorn", reason="the server needs the extra `serving`")
pytest.importorskip("openai", reason="requests are sent by OpenAI's client")

from serve_kit import served

from alora_kernels.settings import read_yaml, write_yaml

from ..support.cli import alora
from .test_examples import EXAMPLES, load

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WEIGHTS = "adapter_model.safetensors"


def small(folder: Path, name: str, **changes: object) -> Path:
    """A recipe of the example with a model of random weights, whose tokenizer has no chat template."""
    path = EXAMPLES / "own_data" / name
    recipe = read_yaml(path.read_text()) | {"model": "tiny-random", "dtype": "float32", "chat_template": CHAT} | changes
    for task in recipe["tasks"]:
        task["source"] = str(path.parent / task["source"])
    (folder / name).write_text(write_yaml(recipe))
    return folder / name


def killed_at(checkpoint: Path, *command: object) -> None:
    """Run a command until a checkpoint is there, then kill it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "alora_kernels", *map(str, command)], env=environment)
    end = time.monotonic() + 300
    while not checkpoint.is_dir():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_walk(tmp_path):
    short = {"epochs": None, "steps": 12, "save_steps": 4, "eval_steps": 4, "output": str(tmp_path / "run"),
             "test_size": 6, "validation_size": 6, "train_size": 40, "max_length": 256}  # fmt: skip
    recipe = small(tmp_path, "recipe.yaml", **short)
    whole = small(tmp_path, "recipe.yaml", **short | {"output": str(tmp_path / "whole")}).rename(
        tmp_path / "whole.yaml"
    )
    small(tmp_path, "recipe.yaml", **short)
    assert all(task in alora("data", recipe) for task in ("tickets", "dates", "front_desk"))
    killed_at(tmp_path / "run" / "checkpoint-8", "train", recipe)
    assert not (tmp_path / "run" / "adapter").exists()
    alora("train", recipe, "--resume")
    adapter = tmp_path / "run" / "adapter"
    alora("train", whole)
    resumed, at_once = load_file(adapter / WEIGHTS), load_file(tmp_path / "whole" / "adapter" / WEIGHTS)
    assert all(torch.equal(resumed[name], at_once[name]) for name in at_once)

    found = json.loads("{" + alora("eval", adapter, "--json").partition("{")[2])
    assert set(found["tasks"]) == {"tickets", "dates", "front_desk"}

    fourth = small(tmp_path, "fourth.yaml", epochs=None, steps=4, test_size=6, output=str(tmp_path / "four"))
    alora("train", fourth, "--from", adapter)
    before, after = resumed, load_file(tmp_path / "four" / "adapter" / WEIGHTS)
    for name, tensor in before.items():
        assert torch.equal(after[name][:3] if tensor.dim() == 3 else after[name], tensor)
    assert alora("tasks", tmp_path / "four" / "adapter", "list").count("urgency")

    with served("tiny-random", tmp_path / "four" / "adapter", tmp_path / "server.log") as (address, _):
        answers = load("own_data/ask").main(address)
    assert set(answers) == {"tickets", "dates", "front_desk", "urgency"}
