"""examples/chat_8b.yaml on a tiny model: four bits, chats, checkpointed activations, packed rows, the best kept."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from alora_kernels import data
from alora_kernels.recipes import train
from alora_kernels.recipes.recipe import Recipe, load_recipe
from tests.support.cli import alora, refused
from tests.support.toyrows import write

EXAMPLE = Path("examples/chat_8b.yaml")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny(folder: Path, template: str | None = TEMPLATE) -> str:
    """A model of two layers that is read from a folder, with a chat template or without."""
    model, tokenizer = data.load_model("tiny-random")
    tokenizer.chat_template = template
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    return str(folder / "model")


def chats(folder: Path, name: str) -> str:
    def turns(i: int) -> Any:
        question, answer = f"{name} of {i}{' and more' * (i % 5)}?", f"{name} {i}" + " so" * (i % 3)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    write(folder / f"{name}.jsonl", ({"messages": turns(i)} for i in range(60)))
    return str(folder / f"{name}.jsonl")


def toy(folder: Path) -> Recipe:
    recipe = load_recipe(EXAMPLE)
    tasks = tuple(dataclasses.replace(task, source=chats(folder, task.name)) for task in recipe.tasks)
    return recipe.instead(tasks=tasks, model=tiny(folder), output=str(folder / "run"), steps=4)


def test_the_example_trains(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    made: list[Any] = []
    build = train.trainer_for
    monkeypatch.setattr(train, "trainer_for", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    folder = train.run(toy(tmp_path))
    (trainer,) = made
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert "Linear4bit" in kinds and trainer.model.get_base_model().model.layers[0].gradient_checkpointing
    assert trainer.packing.padded_because == ""
    assert {parameter.dtype.itemsize for parameter in trainer.model.parameters() if parameter.requires_grad} == {4}
    with (tmp_path / "run" / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["split"], row["task"]) for row in rows} == {
        (split, task) for split in ("train", "validation") for task in ("", "support", "sql")
    }
    assert trainer.state.best_global_step and json.loads((folder / "metrics.json").read_text())["tasks"]
    assert load_recipe(folder / "recipe.yaml").load_in == "4bit"
    assert "support" in alora("eval", folder, "--limit", 2)


def test_chats_need_a_template_before_the_model_is_loaded(tmp_path, monkeypatch):
    recipe = toy(tmp_path).instead(model=tiny(tmp_path / "plain", None))
    monkeypatch.setattr(data, "load_model", lambda *_, **__: pytest.fail("loaded first"))
    recipe.save(tmp_path)
    said = refused("train", tmp_path / "recipe.yaml")
    assert "chat_template" in said and len(said.splitlines()) <= 3
