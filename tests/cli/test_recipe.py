"""Recipes: every mistake said at once with its path, before anything is loaded; paths; YAML as people mean it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from alora_kernels.cli.app import app
from alora_kernels.files import claimed
from alora_kernels.recipes.job import context, load
from alora_kernels.recipes.recipe import Recipe, RecipeError, load_recipe
from alora_kernels.settings import read_yaml, write_yaml
from alora_kernels.training import ALoRATrainer
from tests.support.cli import alora, invoke, recipe, refused

WRONG = {
    "save_steps: often": "save_steps: must be a whole number, got 'often' (a checkpoint every so many steps",
    "train_size: all": "train_size: must be a whole number, got 'all' (at most so many training rows",
    "learning_rate: -1e-3": "learning_rate: must be > 0, got -0.001",
    "learning_rate: fast": "learning_rate: must be a number, got 'fast'",
    "weight_decay: .nan": "weight_decay: must be a finite number, got nan",
    "lora_alpha: [16]": "lora_alpha: must be a number, got [16]",
    "steps: 0": "steps: must be >= 1, got 0",
    "steps: 1.5": "steps: must be a whole number, got 1.5",
    "steps: true": "steps: must be a whole number, got True",
    "batch_size: '8'": "batch_size: must be a whole number, got '8'",
    "lora_dropout: 1": "lora_dropout: must be < 1, got 1",
    "warmup_steps: -1": "warmup_steps: must be >= 0, got -1",
    "conflict_steps: -1": "conflict_steps: must be >= 0, got -1",
    "seed: -1": "seed: must be >= 0, got -1",
    "model: [a]": "model: must be text, got ['a']",
    "model: ''": "model: must not be empty, got ''",
    "output: 7": "output: must be text, got 7",
    "use_rslora: maybe": "use_rslora: must be true or false, got 'maybe'",
    "target_modules: []": "target_modules: must not be empty",
    "target_modules: [q_proj, [v_proj]]": "target_modules[1]: must be text, got ['v_proj']",
    "target_modules: [[q_proj]]": "target_modules[0]: must be text, got ['q_proj']",
    "target_modules: null\nr: 2": "target_modules: nothing is adapted: give it, or target_parameters: all-experts",
    "target_parameters: all-expert": "target_parameters: must be 'all-experts', got 'all-expert'",
    "target_parameters: []": "target_parameters: must not be empty",
    "target_parameters: [[down_proj]]": "target_parameters[0]: must be text, got ['down_proj']",
    "target_parameter: all-experts": "target_parameter: unknown setting; did you mean target_parameters?",
    "method: lora\ntarget_parameters: all-experts": "target_parameters: lora does not adapt experts: leave it out, or",
    "routing: soft\ntarget_parameters: all-experts": "target_parameters: alora-soft does not adapt experts: leave it",
    "experts_A: all": "experts_A: must be 'shared' or 'each', got 'all'",
    "experts_A: shared\nexperts_B: shared": "experts_B: of adapted experts: say which, target_parameters: all-experts",
    "budget: tokens": "budget: must be 'rank' or 'parameters', got 'tokens'",
    "routing: hard": "routing: must be 'task' or 'soft', got 'hard'",
    "method: lore": "method: must be one of alora, alora-soft, lora, lora-per-task, hydralora, got 'lore'; did you",
    "method: [lora]": "method: must be text, got ['lora']",
    "load_in: 2bit": "load_in: must be '4bit' or '8bit', got '2bit'",
    "adapter: ''": "adapter: must not be empty",
    "train_tasks: []": "train_tasks: must not be empty",
    "train_tasks: new": "train_tasks: must be a list, got 'new'",
    "train_b: maybe": "train_b: must be true or false, got 'maybe'",
    "validation_size: 1.5": "validation_size: must be a whole number of rows, or a share below 1, got 1.5",
    "validation_size: -1": "validation_size: must be >= 0, got -1",
    "streaming: 7": "streaming: must be true or false, got 7",
    "max_length: 1": "max_length: must be >= 2, got 1 (tokens per row; null takes the model's context)",
    "chat_template: '{% if %}'": "chat_template: is no Jinja template: Expected an expression, got 'end of",
    "epochs: 0": "epochs: must be > 0, got 0",
    "gradient_accumulation: 0": "gradient_accumulation: must be >= 1, got 0",
    "gradient_checkpointing: 7": "gradient_checkpointing: must be true or false, got 7",
    "packing: maybe": "packing: must be 'auto', got 'maybe'",
    "packing: 7": "packing: must be true or false, got 7",
    "optimizer: lion": "optimizer: must be 'adamw', 'adamw_8bit', 'paged_adamw_8bit', 'adafactor' or 'sgd', got 'lion'",
    "scheduler: cosin": "scheduler: must be 'linear', 'cosine', 'constant' or 'inverse_sqrt', got 'cosin'",
    "warmup_ratio: 1": "warmup_ratio: must be < 1, got 1",
    "max_grad_norm: -1": "max_grad_norm: must be >= 0, got -1",
    "weights: {trec: 0}": "weights.trec: must be > 0, got 0",
    "weights: [trec]": "weights: must be a mapping, got ['trec']",
    "report_to: [tensorbord]": "report_to[0]: must be 'tensorboard', 'wandb' or 'mlflow', got 'tensorbord'",
    "eval_steps: 0": "eval_steps: must be >= 1, got 0",
    "early_stopping: 0": "early_stopping: must be >= 1, got 0",
    "keep_best: 2": "keep_best: must be true or false, got 2",
    "save_total_limit: 0": "save_total_limit: must be >= 1, got 0",
    "logging_steps: 0": "logging_steps: must be >= 1, got 0",
    "stepz: 3": "stepz: unknown setting; did you mean steps?",
    "nothing_like_it: {a: 1}": "nothing_like_it: unknown setting; known are tasks, model",
    "tasks: []": "tasks: give at least one, for example trec",
    "tasks: trec": "tasks: must be a list, got 'trec'",
    "tasks: {trec: 1}": "tasks: must be a list, got {'trec': 1}",
    "tasks: [trec, trec]": "tasks: names must differ, got trec, trec",
    "tasks: [a/x.jsonl, b/x.jsonl]": "tasks: names must differ, got x, x",
    "tasks: [trec, 7]": "tasks[1]: must be a name or a mapping of settings, got 7",
    "tasks: [trek]": "tasks[0]: unknown task 'trek', did you mean trec?",
    "tasks: [{name: x}]": "tasks[0].source: must be given",
    "tasks: [{name: x, source: x.jsonl, promt: 'a'}]": "tasks[0].promt: unknown setting; did you mean prompt?",
    "tasks: [{name: x, source: x.jsonl, words: [a]}]": "tasks[0].words: must be a mapping, got ['a']",
    "tasks: [{name: x, source: x.jsonl, words: {0: true}}]": "tasks[0].words.0: must be text, got True",
    "tasks: [{name: x, source: x.jsonl, prompt: '{a'}]": "tasks[0]: template '{a': expected '}'",
    "method: lora\nrouting: soft": "routing: soft is not how lora works: leave routing out",
    "load_in: 4bit\nmethod: hydralora": "load_in: hydralora replaces plain linear layers: leave load_in out, or use",
    "load_in: 4bit\nparallel: fsdp": "load_in: a base in a few bits is not sharded: parallel: ddp, or",
    "epochs: 2\nsteps: 10": "epochs: give epochs or steps, not both",
    "warmup_steps: 2\nwarmup_ratio: 0.1": "warmup_ratio: give warmup_ratio or warmup_steps, not both",
    "batch_size: 6\ngradient_accumulation: 4": "gradient_accumulation: 6 rows of a step cannot be split evenly in 4",
    "eval_steps: 4\nsave_steps: 2": "save_steps: the best model is one that was judged and saved: leave it out, give 4",
    "early_stopping: 2\nkeep_best: false": "early_stopping: the best model is kept then: leave keep_best out",
    "method: alora-soft\nrouting: task": "routing: task is not how alora-soft works: leave routing out",
}  # fmt: skip


def written(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG)
def test_a_mistake_names_key_value_and_what_is_expected(tmp_path, loads_nothing, text, message):
    path = written(tmp_path, text if text.startswith("tasks:") else f"tasks: [trec]\n{text}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}:" and len(lines) == 2 and message in lines[1]
    assert message in refused("train", path)


def test_all_mistakes_at_once(tmp_path, loads_nothing):
    alone = ("tasks:", "method: ", "routing: ")
    texts = {text: message for text, message in WRONG.items() if not text.startswith(alone) and "\n" not in text}
    texts = {text.partition(":")[0]: (text, message) for text, message in texts.items()}  # one for each key
    path = written(tmp_path, "\n".join(["tasks: [trek, {name: x}]", *(text for text, _ in texts.values())]))
    said = refused("train", path)
    assert all(message in said for _, message in texts.values())
    assert "tasks[0]: unknown task 'trek'" in said and "tasks[1].source: must be given" in said
    assert len(said.splitlines()) == len(texts) + 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [trec", "is not valid YAML: expected ',' or ']', but got '<stream end>' at line 1, column 13"),
        ("tasks: [trec]\nr: 8\nr: 4", "is not valid YAML: 'r' is given twice in one mapping at line 3, column 1"),
        ("tasks: [{name: a, name: b}]", "'name' is given twice in one mapping at line 1, column 19"),
        ("- a\n- b", "must hold a mapping of settings, for example `tasks: [trec, spam]`"),
        ("", "must hold a mapping of settings"),
        ("3: x", "must hold a mapping of settings"),
    ],
)
def test_not_a_recipe(tmp_path, text, message):
    path = written(tmp_path, text)
    assert f"{path} {message}" in refused("train", path) or message in refused("train", path)


def test_files_that_do_not_read(tmp_path):
    assert "no such file" in refused("train", str(tmp_path / "none.yaml"))
    assert "Is a directory" in refused("train", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"tasks: [trec]\nmodel: caf\xe9")
    assert "not valid YAML" in refused("train", str(tmp_path / "latin.yaml"))
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbftasks: [trec]")
    assert load_recipe(tmp_path / "bom.yaml").tasks == ("trec",)


def test_yaml_as_people_mean_it(tmp_path):
    text = """
        tasks: [{name: x, source: x.jsonl, words: {0: no, 1: yes, 007: off, 12:30: noon}}]
        learning_rate: 1e-3
        steps: 1_000
        weight_decay: .5
        use_rslora: yes
        temperature: .inf
        model: 1.5.2
    """
    found = load_recipe(written(tmp_path, text))
    assert found.tasks[0].words == {"0": "no", "1": "yes", "007": "off", "12:30": "noon"}
    assert (found.learning_rate, found.steps, found.weight_decay) == (1e-3, 1000, 0.5)
    assert (found.use_rslora, found.temperature, found.model) == (True, float("inf"), "1.5.2")


TEXTS = ["1e3", "no", "12:30", "010", "", "~", "null", "12", ".5", "1.", "1_0", "2001-01-01", "<<", "é\n: x", "a: b"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_stay_texts(text):
    values = {"a": text, "b": 1e-5, "c": 3, "d": [True, None], text: 1}
    assert read_yaml(write_yaml(values)) == values


def test_data_lies_where_the_recipe_says_whatever_the_current_folder(tmp_path, jsonl, monkeypatch):
    folder, other = tmp_path / "recipes", tmp_path / "elsewhere"
    for path in (folder, other, tmp_path / "home"):
        path.mkdir()
    own = "tasks: [{name: parity, source: ../parity.jsonl}]\nmodel: tiny-random\noutput: run\nsteps: 2\ntest_size: 10"
    config = written(folder, own)
    monkeypatch.chdir(other)
    alora("train", config)
    assert (other / "run" / "adapter" / "recipe.yaml").exists()  # the output folder starts from the current one
    monkeypatch.chdir(tmp_path)
    alora("eval", str(other / "run" / "adapter"))
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(folder / "none.yaml")

    (folder / "base").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    plain = f"a.jsonl, b/c.json, ~/d.jsonl, {tmp_path}/e.jsonl, me/hub"
    mappings = "{name: x, source: f.jsonl, test_split: g.jsonl}, {name: y, source: me/hub, test_split: dev}"
    found = load_recipe(written(folder, f"tasks: [{plain}, {mappings}]\nmodel: base\noutput: ~/out"))
    paths = [task if isinstance(task, str) else (task.source, task.test_split) for task in found.tasks]
    here, home = str(folder), str(tmp_path / "home")
    assert paths == [f"{here}/a.jsonl", f"{here}/b/c.json", f"{home}/d.jsonl", f"{tmp_path}/e.jsonl", "me/hub",
                     (f"{here}/f.jsonl", f"{here}/g.jsonl"), ("me/hub", "dev")]  # fmt: skip
    assert (found.model, found.output) == (f"{here}/base", f"{home}/out")
    said = " ".join(refused("train", str(written(folder, "tasks: [parity.jsonl]"))).split())
    assert f"no file '{folder}/parity.jsonl'" in said and "start from the recipe's own folder" in said


OLDER = """\
tasks:
- trec
- {name: own, source: own.jsonl, prompt: '{prompt}', answer: '{answer}', split: train, test_split: null, subset: null,
   words: {'0': 'no'}, task_column: task}
model: smollm2-135m
output: runs/alora
method: alora
budget: rank
""" + "\n".join(
    ["routing: task", "num_experts: 4", "r: 8", "lora_alpha: 16", "lora_dropout: 0.0", "use_rslora: false",
     "target_modules: all-linear", "steps: 40", "batch_size: 32", "learning_rate: 1.0e-05", "warmup_steps: 4",
     "weight_decay: 0.0", "temperature: 1000000.0", "train_size: null", "test_size: 100", "max_length: 96",
     "save_steps: 0", "conflict_steps: 0", "seed: 0"]
)  # fmt: skip


def test_recipes_saved_before_still_read_from_the_folder_they_were_written_in(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    found = load_recipe(written(tmp_path / "adapter", OLDER), root=Path())
    own = found.tasks[1]
    assert (own.source, own.words) == (os.fspath(tmp_path / "own.jsonl"), {"0": "no"})
    assert (found.learning_rate, found.lora_alpha, found.method) == (1e-5, 16.0, "alora")


@pytest.mark.parametrize("changes", [{}, {"temperature": float("inf")}, {"train_size": None, "target_modules": ("q",)}])
def test_a_saved_recipe_reads_the_same(tmp_path, changes):
    written(tmp_path, "tasks: [trec, {name: own, source: own.jsonl, words: {1e3: no}}]\nlearning_rate: 1e-5")
    first = load_recipe(tmp_path / "r.yaml").instead(**changes)
    first.save(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == first


def test_a_chat_template_is_text_or_a_file(tmp_path):
    generation = "{% for m in messages %}{%- generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(generation)
    found = load_recipe(written(tmp_path, "tasks: [trec]\nchat_template: chat.jinja\nadapter: old"))
    assert (found.chat_template, found.adapter) == (generation, str(tmp_path / "old"))
    found.save(tmp_path)
    (tmp_path / "chat.jinja").unlink()
    assert load_recipe(tmp_path / "recipe.yaml").chat_template == generation  # what is saved says all
    assert "chat_template: cannot read" in refused("train", tmp_path / "r.yaml")
    assert Recipe(tasks=("trec",), chat_template="{{ messages }}").chat_template == "{{ messages }}"


def test_rows_are_as_long_as_the_model_reads(tmp_path, jsonl):
    job = load(load_recipe(recipe(tmp_path, jsonl)))
    assert job.recipe.max_length == 2048 == job.model.config.max_position_embeddings
    with pytest.raises(ValueError, match="max_length: this model does not say"):
        context(SimpleNamespace(config=None), SimpleNamespace(model_max_length=int(1e30)))


def test_other_settings_are_checked_too():
    first = Recipe(tasks=("trec",), routing="soft")
    assert first.instead(steps=None) == first
    with pytest.raises(RecipeError, match=re.escape("steps: must be >= 1, got 0")):
        first.instead(steps=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_card_has_templates_scores_and_the_recipe_and_no_path(tmp_path, jsonl):
    file = recipe(tmp_path, jsonl, tasks=f"[{{name: even, source: {jsonl}, prompt: 'Of {{text}}: is it'}}]")
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    jsonl.write_text("".join(json.dumps({"text": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows))
    alora("train", file)
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert '- `even`: `"Of {text}: is it" with ' in text and 'load_model("tiny-random")' in text
    assert re.search(r"\| even \| accuracy \| \d+\.\d % \|", text)
    kept = read_yaml(text.partition("```yaml\n")[2].partition("```")[0])
    assert (kept["tasks"], kept["r"], kept["steps"], kept["dtype"]) == (["even"], 2, 4, "float32")
    assert str(tmp_path) not in text and text.count("import alora_kernels\n") + text.count("import alora_kernels ") == 1


def test_a_finished_adapter_is_not_replaced_unasked(tmp_path, jsonl, request):
    config = recipe(tmp_path, jsonl, save_steps=2)
    alora("train", config)
    request.getfixturevalue("loads_nothing")
    before = contents(tmp_path / "run")
    said = " ".join(refused("train", config).split())
    assert "holds a finished adapter" in said and all(way in said for way in ("--overwrite", "--resume", "--output"))
    assert "holds a finished adapter" in refused("train", config, "--method", "lora")
    assert "holds a finished" in refused("train", config, "--output", str(tmp_path / "x" / ".." / "run"))
    assert "holds a finished adapter" in refused("demo", "--output", str(tmp_path / "run"))
    assert "give one of them" in refused("train", config, "--resume", "--overwrite")
    assert "is, or lies below, a file" in refused("train", config, "--output", str(jsonl / "x"))
    assert "is, or lies below, a file" in refused("train", config, "--output", "/dev/null")
    assert f"wrote, {tmp_path / 'run' / 'adapter'}" in refused("eval", str(tmp_path / "run"))
    assert contents(tmp_path / "run") == before


def test_overwrite_leaves_nothing_of_the_earlier_run(tmp_path, jsonl):
    config = recipe(tmp_path, jsonl, save_steps=2, conflict_steps=2)
    alora("train", config)
    first = contents(tmp_path / "run" / "adapter")
    more = {"overwrite": "true", "save_total_limit": "null"}
    alora("train", str(recipe(tmp_path, jsonl, save_steps=1, steps=3, seed=1, conflict_steps=3, **more)))
    second = contents(tmp_path / "run" / "adapter")
    assert first.keys() == second.keys() and all(first[name] != second[name] for name in first if "model" in name)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (1, 2, 3)}
    steps = {line.split(",")[0] for line in (tmp_path / "run" / "conflicts.csv").read_text().splitlines()[1:]}
    assert steps == {"3"}


def test_overwrite_keeps_what_is_there_until_everything_is_loaded(tmp_path, jsonl):
    alora("train", str(recipe(tmp_path, jsonl, save_steps=2)))
    before = contents(tmp_path / "run")
    refused("train", str(recipe(tmp_path, jsonl, model="nowhere")), "--overwrite")
    assert contents(tmp_path / "run") == before


def test_resume_passes_over_a_checkpoint_that_is_cut_short_and_says_so(tmp_path, jsonl):
    config = recipe(tmp_path, jsonl, save_steps=2)
    alora("train", config)
    whole = contents(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "adapter")
    os.truncate(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", 1000)
    assert "checkpoint-4 is passed over: File is not a zip file" in alora("train", config, "--resume")
    again = contents(tmp_path / "run" / "adapter")
    assert all(again[name] == whole[name] for name in whole if "model" in str(name))
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    assert "no whole checkpoint in" in refused("train", config, "--resume")
    assert "holds a finished adapter" in refused("train", config)


def test_a_run_shorter_than_its_logs_ends_well(tmp_path, jsonl):
    out = alora("train", recipe(tmp_path, jsonl, steps=2, logging_steps=10))
    assert "adapter saved" in out and not (tmp_path / "run" / "losses.png").exists()
    assert (tmp_path / "run" / "adapter" / "metrics.json").exists()


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path, jsonl):
    with claimed(tmp_path / "run"):
        said = refused("train", str(recipe(tmp_path, jsonl)), "--overwrite")
    assert f"process {os.getpid()} is writing into" in said


def test_a_run_that_has_begun_is_not_mixed_with_another(tmp_path, jsonl):
    config = recipe(tmp_path, jsonl, save_steps=2)
    assert "no checkpoint in" in (said := refused("train", config, "--resume")) and "without --resume" in said
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "losses.csv").touch()  # killed before its first checkpoint
    assert "with --overwrite" in " ".join(refused("train", config, "--resume").split())
    alora("train", config, "--overwrite")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    said = " ".join(refused("train", config).split())
    assert "holds a run that has begun" in said and "--resume" in said and "--overwrite" in said
    alora("train", config, "--resume")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    (tmp_path / "run2").mkdir()
    alora("train", config, "--output", str(tmp_path / "run2"))  # an empty folder is as good as none


def test_the_schema_is_one_and_takes_what_recipes_take():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(alora("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    right = jsonschema.Draft202012Validator(schema)
    examples = [*Path("examples").glob("*.yaml"), *Path("examples/paper").glob("*.yaml")]
    recipes = [read_yaml(path.read_text()) for path in examples if "fed" not in path.name]
    assert len(recipes) >= 5
    for values in [*recipes, {"tasks": ["trec"], "report_to": "none", "packing": True, "steps": None}]:
        right.validate(values)
    for wrong in ({"stepz": 3}, {"steps": 0}, {"optimizer": "lion"}, {"packing": "maybe"}, {"weights": {"trec": 0}}):
        assert not right.is_valid({"tasks": ["trec"], **wrong})
    assert all(each.get("description") for each in schema["properties"].values())


def test_quiet_says_the_last_line_alone(tmp_path, jsonl):
    said = alora("train", recipe(tmp_path, jsonl), "--quiet", "--epochs", 1, "--output", tmp_path / "q")
    assert said == f"adapter saved: {tmp_path / 'q' / 'adapter'}\n"
    assert load_recipe(tmp_path / "q" / "adapter" / "recipe.yaml").steps is None
    assert "unknown setting" in refused("train", recipe(tmp_path, jsonl, stepz=1), "--quiet")
    assert "Exit codes: 0 done" in alora("--help") and "--install-completion" in alora("--help")


def test_a_hub_that_is_not_there_is_said_once(tmp_path, jsonl):
    refused("train", recipe(tmp_path, jsonl, model="nobody/nothing"))
    assert logging.getLogger("huggingface_hub.utils._http").getEffectiveLevel() == logging.ERROR


def test_the_page_of_keys_is_that_of_the_recipe():
    """`alora schema --markdown` makes it."""
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page.split("<!-- recipe-keys -->\n")[1].split("\n<!--")[0] == alora("schema", "--markdown").rstrip()


def test_keys_of_other_tools_and_templates_that_are_none_are_told(tmp_path, jsonl):
    said = refused("train", recipe(tmp_path, jsonl, lr=1, lora_r=8, sequence_len=99, chat_template="chatml"))
    for line in ("lr: unknown setting; here it is learning_rate", "lora_r: unknown setting; here it is r",
                 "sequence_len: unknown setting; here it is max_length",
                 "chat_template: 'chatml' is neither Jinja nor the path of a .jinja file"):  # fmt: skip
        assert line in said


def test_who_stops_a_run_is_told_how_it_goes_on(tmp_path, jsonl, monkeypatch):
    def stopped(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ALoRATrainer, "training_step", stopped)
    assert "stopped at step 0: --resume goes on" in invoke(app, "train", recipe(tmp_path, jsonl), code=130)
