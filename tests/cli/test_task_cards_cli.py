"""`alora train` writes how its tasks were asked: built-in tasks, files, answers in texts, methods without tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alora_kernels.adapters.cards import FILE, TaskCard, read_task_cards
from alora_kernels.cli.app import app
from alora_kernels.data import TASKS, TaskSpec, load_tasks, task_cards


def alora(*args: str) -> str:
    result = CliRunner().invoke(app, args, env={"COLUMNS": "160"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [{"n": i, "answer": "yes" if i % 2 else "no", "task": ("even", "odd")[i % 2]} for i in range(60)]
    path = tmp_path / "parity.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def trained(tmp_path: Path, rows: Path, **more: str) -> Path:
    spec = f"{{name: parity, source: {rows}, prompt: 'Is {{n}} odd? '}}"
    lines = {"tasks": f"[{spec}, spam]", "model": "tiny-random", "output": str(tmp_path / "run"), "steps": "1",
             "batch_size": "4", "train_size": "20", "test_size": "8", "r": "2", **more}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{k}: {v}" for k, v in lines.items()))
    alora("train", str(tmp_path / "recipe.yaml"))
    return tmp_path / "run" / "adapter"


def test_train_writes_templates_label_words_and_a_public_sample(tmp_path: Path, rows: Path):
    folder = trained(tmp_path, rows)
    cards = read_task_cards(folder, ("even", "odd", "spam"))
    assert cards["even"].template == cards["odd"].template == "Is {n} odd?"
    assert cards["odd"].answers == ("yes",) and cards["even"].answers == ("no",)
    assert cards["even"].sample is None, "a row of the user's data left with the adapter"
    assert cards["spam"].template == TASKS["spam"].template and cards["spam"].answers == ("spam", "ham")
    head, tail = TASKS["spam"].template.split("{text}")
    assert cards["spam"].sample.startswith(head) and cards["spam"].sample.endswith(tail)


def test_a_method_whose_tasks_have_no_names_leaves_no_file(tmp_path: Path, rows: Path):
    folder = trained(tmp_path, rows, method="alora-soft")
    assert (folder / "adapter_config.json").exists() and not (folder / FILE).exists()


def test_a_task_that_several_files_could_have_named_has_no_template(rows: Path):
    one, other = (TaskSpec(name, str(rows), prompt=f"{name} {{n}}:") for name in ("a", "b"))
    assert task_cards([one], load_tasks([one], test_size=4), {})["even"] == TaskCard("a {n}:")
    both = task_cards([one, other], load_tasks([one, other], test_size=4), {"odd": ["yes"]})
    assert both == {"even": TaskCard(), "odd": TaskCard(None, ("yes",))}
