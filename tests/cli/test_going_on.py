"""`alora train` with `adapter:`, `train_tasks:` and `train_b:`: new tasks learn, the others stay to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from alora_kernels.adapters.cards import read_task_cards
from alora_kernels.adapters.reader import AdapterFile, read_adapter
from alora_kernels.cli.app import app
from alora_kernels.recipes.job import load
from alora_kernels.recipes.recipe import Recipe, load_recipe
from alora_kernels.recipes.start import start_of
from tests.support.adapters import change_config, change_weights, tiny_base
from tests.support.cli import alora, recipe, refused
from tests.support.toyrows import write


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter with the tasks even and odd, and rows of a third in the folder above."""
    folder = tmp_path_factory.mktemp("first")
    for task, yes in (("even", 0), ("odd", 1), ("third", 2)):
        rows = ({"prompt": f"Number {i}: is it {task}?", "answer": "yes" if i % 3 == yes else "no"} for i in range(40))
        write(folder / f"{task}.jsonl", rows)
    path = named(folder, ["even", "odd"], learning_rate=0.05, weight_decay=0.1, warmup_steps=0)
    alora("train", path)
    return folder / "run" / "adapter"


def named(folder: Path, tasks: list[str], data: Path | None = None, **more: Any) -> Path:
    entries = ", ".join(f"{{name: {t}, source: {(data or folder) / t}.jsonl}}" for t in tasks)
    return recipe(folder, Path(), **{"tasks": f"[{entries}]", "test_size": 5, "warmup_steps": 0, **more})


def onward(tmp_path: Path, first: Path, tasks: list[str], **more: Any) -> Path:
    """A recipe that goes on from the first adapter."""
    given = {"adapter": first, "learning_rate": 0.05, "weight_decay": 0.3} | more
    return named(tmp_path, tasks, first.parent.parent, **given)


def same(one: AdapterFile, other: AdapterFile, task: str) -> bool:
    return all(torch.equal(a, other.matrices(task)[name]) for name, a in one.matrices(task).items())


def same_b(one: AdapterFile, other: AdapterFile) -> bool:
    return all(torch.equal(b, other.b[name]) for name, b in one.b.items())


def test_rows_that_an_earlier_run_trained_on_are_counted(tmp_path, first):
    said = "rows that this adapter was trained on judge it here: "
    assert said not in alora("train", onward(tmp_path, first, ["even", "third"], steps=1))
    second = (tmp_path / "run").rename(tmp_path / "second") / "adapter"
    out = alora("train", onward(tmp_path, first, ["even", "odd"], adapter=second, steps=1, seed=5))
    counts = out.split(said)[1].splitlines()[0]
    assert "even" in counts and "odd" in counts  # of odd the second run saw nothing, the first one did


def test_a_new_task_learns_and_the_others_stay_to_the_bit(tmp_path, first):
    path = onward(tmp_path, first, ["even", "odd", "third"], train_tasks="[third]", save_steps=2)
    out = alora("train", path)
    assert "new: third" in out and "trains third; B and even, odd stay as they are; 70 training rows of theirs" in out
    assert "third" in out.split("step ")[1] and "even" not in out.split("step ")[1].splitlines()[0]
    before, after = read_adapter(first), read_adapter(tmp_path / "run" / "adapter")
    assert after.tasks == ("even", "odd", "third")
    assert same_b(before, after) and same(before, after, "even") and same(before, after, "odd")
    assert read_task_cards(after.folder, after.tasks).keys() == {"even", "odd", "third"}
    fresh = load(load_recipe(path)).model.state_dict()
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(
        fresh[f"base_model.model.{name}.asymlora_A.default.weight"][2], after.matrices("third")[name]
    )

    after = read_adapter((tmp_path / "run" / "adapter").rename(tmp_path / "first time"))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    alora("train", path, "--resume")
    again = read_adapter(tmp_path / "run" / "adapter")
    assert all(same(again, after, task) for task in after.tasks) and same_b(again, after)

    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        models = (PeftModel.from_pretrained(tiny_base()[0], folder) for folder in (first, again.folder))
        one, other = (m.eval()(input_ids=ids, adapter_names=["odd"]).logits for m in models)
    assert torch.equal(one, other)


def test_scores_after_training_are_those_of_eval_with_chats_too(tmp_path):
    for task, words in (("old", ("no", "yes")), ("new", ("red", "blue", "green"))):
        chats = (
            [{"role": "user", "content": f"{task} {i}?"}, {"role": "assistant", "content": words[i % len(words)]}]
            for i in range(30)
        )
        write(tmp_path / f"{task}.jsonl", ({"messages": turns} for turns in chats))
    specs = [f"{{name: {task}, source: {task}.jsonl, metric: choice}}" for task in ("old", "new")]
    more: dict[str, Any] = {"learning_rate": 0.05, "steps": 2, "test_size": 9, "tasks": f"[{specs[0]}]"}
    alora("train", recipe(tmp_path, Path(), output=tmp_path / "one", **more))
    more |= {"adapter": tmp_path / "one" / "adapter", "train_tasks": "[new]", "tasks": f"[{', '.join(specs)}]"}
    alora("train", recipe(tmp_path, Path(), **more))
    told = json.loads((tmp_path / "run" / "adapter" / "metrics.json").read_text())
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "run" / "adapter"), "--json"])
    assert told == json.loads(result.stdout)
    assert told["tasks"]["old"]["score"] > 0 and told["tasks"]["new"]["score"] > 0


def test_with_b_the_others_answer_otherwise_and_it_is_said(tmp_path, first):
    path = onward(tmp_path, first, ["third"], adapter="null", train_b="true")
    out = alora("train", path, "--from", first, "--train-tasks", "third")
    assert "B trains, which changes what even, odd answer too; their A stay as they are" in out
    before, after = read_adapter(first), read_adapter(tmp_path / "run" / "adapter")
    assert same(before, after, "even") and not same_b(before, after)
    assert read_task_cards(after.folder, after.tasks).keys() == {"even", "odd", "third"}  # two of them from the first


def test_without_train_tasks_all_with_rows_learn(tmp_path, first):
    out = alora("train", onward(tmp_path, first, ["odd"], train_b="false"))
    assert "trains odd; B and even stay as they are" in out
    before, after = read_adapter(first), read_adapter(tmp_path / "run" / "adapter")
    assert same(before, after, "even") and same_b(before, after) and not same(before, after, "odd")
    assert "not judged, for there are no rows: even" in alora("eval", tmp_path / "run" / "adapter")


def test_tasks_that_came_and_went_are_judged_as_far_as_they_can_be(tmp_path, first):
    shutil.copytree(first, tmp_path / "a")
    alora("tasks", tmp_path / "a", "remove", "odd", "--overwrite")
    alora("tasks", tmp_path / "a", "add", "new", "--overwrite")
    out = alora("eval", tmp_path / "a")
    assert "no such task: odd" in out and "no rows: new" in out and "even" in out
    # under another name other rows would judge, some of which it was trained on
    alora("tasks", tmp_path / "a", "rename", "even", "equal", "--overwrite")
    assert "has the tasks equal, new, and the rows are of even, odd" in refused("eval", tmp_path / "a")


def test_mistakes_are_told_before_the_base_is_loaded(tmp_path, first, monkeypatch):
    monkeypatch.setattr("alora_kernels.data.load_model", lambda *_, **__: pytest.fail("loaded before all was checked"))
    soft, zero = tmp_path / "soft", tmp_path / "zero"
    shutil.copytree(first, zero)
    change_weights(zero, lambda tensors: [t.zero_() for name, t in tensors.items() if "_B" in name])
    soft.mkdir()
    (soft / "method.json").write_text('{"settings": {"name": "alora-soft"}}')
    for settings, message in (
        ({"train_tasks": "[thrid]"}, "train_tasks: 'thrid' is no task; did you mean third?"),
        ({"train_tasks": "[odd]"}, "train_tasks: 'odd' has no training rows"),
        ({"train_tasks": "[even]"}, "train_tasks: there are rows of third, of which the adapter knows nothing"),
        ({"adapter": "null", "train_tasks": "[third]"}, "say which adapter goes on (adapter: FOLDER, --from FOLDER)"),
        ({"adapter": "null", "train_b": "false"}, "say which adapter goes on (adapter: FOLDER, --from FOLDER)"),
        ({"r": 8, "lora_alpha": 5}, "lora_alpha: 5.0 in the recipe, but"),
        ({"method": "lora"}, "is an ALoRA adapter and stays one"),
        ({"adapter": soft}, "is of the method ALoRA, soft"),
        ({"adapter": tmp_path / "nothing"}, "no such folder"),
        ({"adapter": zero, "train_tasks": "[third]"}, "is zero, so that nothing trains without it: train_b: true"),
    ):
        path = onward(tmp_path, first, ["even", "third"], **settings)
        assert message in refused("train", path).replace("\n", " "), settings


def test_an_adapter_of_another_base_is_refused_with_its_shapes(tmp_path, first):
    other = tmp_path / "other"
    base, tokenizer = tiny_base()
    config = base.config
    config.intermediate_size *= 2
    type(base)(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    out = refused("train", onward(tmp_path, first, ["odd"], model=other))
    assert "does not fit this base" in out and "in the file but" in out


def test_what_a_run_starts_from_says_when_the_base_has_another_name(tmp_path, first):
    shutil.copytree(first, tmp_path / "from")
    change_config(tmp_path / "from", base_model_name_or_path="models/one")
    path = onward(
        tmp_path,
        first,
        ["odd", "third"],
        train_tasks="[odd, third]",
        adapter=tmp_path / "from",
        weights="{even: 2, odd: 3}",
    )
    given, start = start_of(load_recipe(path), ("odd", "third"))
    assert isinstance(given, Recipe) and start is not None and not start.b and start.still == ["even"]
    assert given.weights == {"odd": 3} and given.r == 2 and start.trained(["odd", "even"]) == ["odd"]
    with pytest.raises(ValueError, match="a run that goes on from one is not sharded"):
        start_of(load_recipe(path).instead(parallel="fsdp"), ("odd", "third"))
    base, _ = tiny_base()
    base.name_or_path = "hub/one"
    assert not any("only shapes are checked" in line for line in start.lines([], base))
    base.name_or_path = "hub/two"
    assert "trained on models/one, and this base is hub/two: only shapes are checked" in start.lines([], base)[-1]
