"""`streaming: true` in a recipe: it trains on what the table would hold, and settings of a table are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alora_kernels.cli.app import app
from alora_kernels.recipes.recipe import Recipe, RecipeError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "streaming: a stream has no end, nor epochs: give steps"),
        ({"steps": 2, "temperature": 2.0}, "streaming: rows come as weights say"),
        ({"steps": 2, "group_by_length": True}, "streaming: rows come as weights say"),
    ],
)
def test_settings_of_a_table(settings: dict[str, object], message: str):
    with pytest.raises(RecipeError, match=message):
        Recipe.of({"tasks": ["spam"], "streaming": True, **settings})


def test_a_stream_trains(tmp_path: Path, jsonl: Path):
    path = tmp_path / "recipe.yaml"
    settings = {"model": "tiny-random", "tasks": [str(jsonl)], "streaming": True, "steps": 3, "batch_size": 4}
    path.write_text(json.dumps({**settings, "test_size": 4, "max_length": 8, "output": str(tmp_path / "run")}))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    assert "while training: prompts cut in the middle to fit max_length=8" in result.output
    assert (tmp_path / "run" / "adapter" / "adapter_tasks.json").exists()
    assert "its first rows alone were looked at" in CliRunner().invoke(app, ["data", str(path)]).output
