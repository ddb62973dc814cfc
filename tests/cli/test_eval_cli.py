"""`alora eval` and what training says of each task: every metric, its refusals, the JSON documents."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alora_kernels import data
from alora_kernels.cli.app import app
from alora_kernels.recipes import judge
from alora_kernels.recipes.job import load
from alora_kernels.recipes.recipe import load_recipe
from alora_kernels.training.answers import Written
from tests.support.cli import alora, recipe, refused
from tests.support.toyrows import write


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A recipe of five tasks, one for each metric; two are named by a column of their file."""
    parity = ({"prompt": f"Is {i} {t}?", "answer": ("yes", "no")[(i + (t == "odd")) % 2], "task": t}
              for i in range(40) for t in ("even", "odd"))  # fmt: skip
    write(tmp_path / "parity.jsonl", parity)
    write(tmp_path / "say.jsonl", ({"prompt": f"Say {i}.", "answer": f"now {i} is said"} for i in range(40)))
    write(tmp_path / "sum.jsonl", ({"prompt": f"{i}+1=", "answer": f"it is {i + 1}"} for i in range(40)))
    specs = ["{name: parity, source: parity.jsonl}", "{name: text, source: say.jsonl}"]
    specs += [f"{{name: {m}, source: {f}.jsonl, metric: {m}}}" for m, f in (("exact", "say"), ("rouge", "say"))]
    specs += ["{name: number, source: sum.jsonl, metric: number}"]
    return recipe(tmp_path, tmp_path / "none", tasks=f"[{', '.join(specs)}]", test_size=6, max_length=64, steps=2)


def as_json(*args: object) -> dict:
    """The document that `alora eval --json` prints on standard output, where nothing else may stand."""
    result = CliRunner().invoke(app, ["eval", *map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    assert "base in float32" in result.stderr
    return json.loads(result.stdout)


def test_every_metric_in_tables_and_json(tmp_path, many):
    out = alora("train", many)
    for title in ("accuracy: choice", "exact match", "ROUGE-L", "last number", "loss per token"):
        assert title in out
    folder = tmp_path / "run" / "adapter"
    saved = json.loads((folder / "metrics.json").read_text())
    metrics = {task: own["metric"] for task, own in saved["tasks"].items()}
    assert metrics == {"even": "choice", "text": "loss", "exact": "exact", "rouge": "rouge",
                       "number": "number"}  # fmt: skip
    assert sum(own["rows"] for own in saved["tasks"].values()) == 30
    assert saved["dtype"] == "float32" and saved["method"] == "alora" and saved["versions"]["torch"]
    assert as_json(folder) == saved
    for page in ("| exact match |", "| ROUGE-L |", "| right numbers |"):
        assert page in (folder / "README.md").read_text()

    judged = as_json(folder, "--base", "--limit", "2")
    assert all(own["rows"] <= 2 and "base" in own for own in judged["tasks"].values())
    assert judged["tasks"]["exact"]["majority"] == 0.0 and set(judged["tasks"]["rouge"]) >= {"rouge1", "rouge2"}
    mean = [judged["tasks"][task]["base"] for task in ("even", "odd") if task in judged["tasks"]]
    assert judged["mean"]["choice"]["base"] == pytest.approx(sum(mean) / len(mean))


def test_written_answers_are_asked_by_the_trained_prompt_and_judged_by_the_tasks_metric(many, monkeypatch):
    job = load(load_recipe(many))
    asked, given = [], {}

    def writes(model, prompts, *, ends, max_tokens, **how):
        asked.extend(prompts)
        given.update(ends=ends, max_tokens=max_tokens)
        texts = {"exact": " Now 3 is  said.", "rouge": " now it is", "number": " perhaps 7"}
        return [Written(job.tokenizer(texts[row["task"]]).input_ids, row["task"] != "number") for row in prompts]

    monkeypatch.setattr(judge, "written_answers", writes)
    scores = judge.judge(job, "x")
    rows = {task: [r for r in job.text["test"] if r["task"] == task] for task in ("exact", "rouge", "number")}
    assert scores.by["exact"]["exact"] == sum(r["answer"] == "now 3 is said" for r in rows["exact"]) / 6
    assert scores.by["rouge"]["rouge"] == pytest.approx(2 * 2 / 7) and scores.by["rouge2"]["rouge"] == 0.0
    assert scores.by["number"]["number"] == sum(r["answer"] == "it is 7" for r in rows["number"]) / 6
    assert scores.unfinished == {"number": 6}
    bos = [i for i in job.tokenizer("").input_ids[:1] if i == job.tokenizer.bos_token_id]
    prompts = {tuple(bos + job.tokenizer(r["prompt"]).input_ids) for own in rows.values() for r in own}
    assert {tuple(row["input_ids"]) for row in asked} == prompts
    assert job.tokenizer.eos_token_id in given["ends"]
    longest = max(len(job.tokenizer(f" {r['answer']}").input_ids) for own in rows.values() for r in own)
    assert longest < given["max_tokens"] < 2 * longest + 12


def test_a_trained_model_writes_its_answers(tmp_path):
    one, two = (
        write(tmp_path / f"{word}.jsonl", ({"prompt": f"Item {i}:", "answer": f"{word} one"} for i in range(40)))
        for word in ("blue", "green")
    )
    tasks = f"[{{name: blue, source: {one}, metric: exact}}, {{name: green, source: {two}, metric: exact}}]"
    path = recipe(tmp_path, one, tasks=tasks, steps=40, batch_size=16, learning_rate="1e-2")
    alora("train", path)
    found = json.loads((tmp_path / "run" / "adapter" / "metrics.json").read_text())["tasks"]
    assert all(own["score"] == 1.0 and own["unfinished"] == 0 for own in found.values())


def test_other_rows_that_were_trained_on_are_counted(tmp_path, jsonl):
    path = recipe(tmp_path, jsonl, steps=1)
    alora("train", path)
    folder, other = tmp_path / "run" / "adapter", tmp_path / "other.yaml"
    assert "was trained on" not in alora("eval", folder, "--data", path)
    other.write_text(path.read_text() + "\nseed: 5")
    said = alora("eval", folder, "--data", other)
    assert "rows that this adapter was trained on judge it here: " in said


def test_the_confusion_table_counts_every_row(tmp_path, jsonl):
    alora("train", recipe(tmp_path, jsonl, steps=1))
    job = load(load_recipe(tmp_path / "run" / "adapter" / "recipe.yaml"), tmp_path / "run" / "adapter")
    scores = judge.judge(job, "x")
    for task, pairs in scores.chosen.items():
        assert pairs.total() == job.test["task"].count(task)
        right = sum(count for (truth, chosen), count in pairs.items() if truth == chosen)
        assert right / pairs.total() == scores.accuracy[task]
    out = alora("eval", tmp_path / "run" / "adapter", "--confusion")
    assert out.count("right / chosen") == 2
    assert "right / chosen" not in alora("eval", tmp_path / "run" / "adapter")


def test_other_rows(tmp_path, jsonl):
    alora("train", recipe(tmp_path, jsonl, steps=1))
    folder = tmp_path / "run" / "adapter"
    rows = write(tmp_path / "new.jsonl", ({"prompt": f"New {i}?", "answer": "yes", "task": "even"} for i in range(13)))
    found = as_json(folder, "--data", rows)["tasks"]
    assert {task: own["rows"] for task, own in found.items()} == {"even": 13}
    other = tmp_path / "other.yaml"
    other.write_text(f"tasks: [{{name: parity, source: {jsonl}, test_split: new.jsonl}}]\ntest_size: 5")
    assert as_json(folder, "--data", other)["tasks"]["even"]["rows"] == 5
    (tmp_path / "b").mkdir()
    more = write(tmp_path / "more.jsonl", ({"prompt": f"So {i}?", "answer": "yes"} for i in range(30)))
    two = f"[{{name: a, source: {jsonl}}}, {{name: b, source: {more}}}]"
    alora("train", recipe(tmp_path / "b", jsonl, tasks=two, steps=1))
    assert "give a recipe whose tasks have test_split" in refused("eval", tmp_path / "b/run/adapter", "--data", rows)


@pytest.mark.parametrize(
    ("spec", "answer", "said"),
    [
        ("metric: choice", "text {i} of its own", "hardly two of its answers are alike"),
        ("metric: number", "no such thing", "10 of its 10 test answers hold no number, such as 'no such thing'"),
        ("metric: rouge", "!!!", "hold no word"),
        ("metric: bleu", "x", "must be"),
    ],
)
def test_metrics_that_a_task_cannot_have(tmp_path, monkeypatch, spec, answer, said):
    monkeypatch.setattr(data, "load_model", lambda *_, **__: pytest.fail("the model was loaded first"))
    source = write(tmp_path / "t.jsonl", ({"prompt": f"Row {i}", "answer": answer.format(i=i)} for i in range(40)))
    message = refused("train", recipe(tmp_path, source, tasks=f"[{{name: t, source: {source}, {spec}}}]"))
    assert said in message and message.count("\n") <= 3


def test_files_that_may_name_the_same_tasks_must_agree(tmp_path, jsonl):
    more = write(tmp_path / "more.jsonl", ({"prompt": f"So {i}?", "answer": "yes", "task": "odd"} for i in range(30)))
    specs = f"[{{name: a, source: {jsonl}, metric: exact}}, {{name: b, source: {more}}}]"
    said = refused("train", recipe(tmp_path, jsonl, tasks=specs))
    assert "stands in a column of one of a, b, whose metrics differ" in said


def test_a_task_without_a_row_to_judge_by_is_null_in_json(tmp_path, jsonl):
    job = load(load_recipe(recipe(tmp_path, jsonl)))
    scores = judge.Scores({"choice": {"even": math.nan, "odd": 0.5}})
    found = judge.metrics(job, tmp_path, None, scores)
    assert found["tasks"]["even"]["score"] is None and found["mean"]["choice"]["score"] == 0.5
    assert "NaN" not in json.dumps(found)
