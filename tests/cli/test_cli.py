"""The command line, on a tiny random model: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from alora_kernels import data, kernels
from alora_kernels.adapters.cards import FILE, TaskCard, read_task_cards
from alora_kernels.cli import doctor
from alora_kernels.data import TASKS, TaskSpec, load_tasks, task_cards
from alora_kernels.kernels import tiles
from alora_kernels.recipes import demo as demo_module
from alora_kernels.recipes import train
from alora_kernels.recipes.job import _are_texts, load
from alora_kernels.recipes.judge import judge
from alora_kernels.recipes.recipe import Recipe, load_recipe
from alora_kernels.version import __version__
from tests.support.cli import alora, recipe, refused
from tests.support.toyrows import need_data, write

PAPER = Path(__file__).parents[2] / "examples" / "paper"
RECIPES = [path for path in sorted(PAPER.glob("*.yaml")) if "alora train" in path.read_text()]


def test_help_names_every_command():
    text = alora("--help")
    assert all(command in text for command in ("demo", "train", "eval", "doctor", "export", "import", "serve"))
    assert "--resume" in alora("train", "--help")
    assert alora("--version").strip() == f"alora-kernels {__version__}"


def test_doctor_says_what_and_why():
    text = alora("doctor")
    assert "torch" in text
    assert re.search(r"cpu.*torch.*Triton\s+serves CUDA", " ".join(text.split()))


def test_doctor_names_the_plan_of_each_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_devices", lambda: [torch.device("cpu"), torch.device("cuda", 0)])
    monkeypatch.setattr(doctor, "_device_name", lambda device: "some chip")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(kernels.tiles, "_device_chip", lambda device: "sm_999")
    monkeypatch.setattr(kernels.tuned, "identity", lambda device: {"chip": "x"})
    text = " ".join(alora("doctor").split())
    assert "long square, task" in text
    assert "base_first" in text and "no measurement on sm_999" in text
    assert "9433" not in text
    monkeypatch.setattr(kernels, "chip_of", lambda device: "sm_90")
    monkeypatch.setattr(tiles, "TRITON", (3, 6))
    assert "is pipelined here" in " ".join(alora("doctor").split())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_papers_read_and_say_what_to_fetch(path):
    found = load_recipe(path)
    assert found.method == "alora-soft" and found.num_experts == 3 and found.r == 8 and found.learning_rate == 3e-4
    assert path.read_text().startswith("# git clone https://github.com/")
    refusal = " ".join(refused("train", str(path)).split())
    assert "no file" in refusal and "data/" in refusal


def test_conflicts_are_measured_where_analyze_finds_them(tmp_path, jsonl):
    config = recipe(tmp_path, jsonl, conflict_steps=2, save_steps=2)
    alora("train", str(config))
    file = tmp_path / "run" / "conflicts.csv"
    first = file.read_text()
    steps = {line.split(",")[0] for line in first.splitlines()[1:]}
    assert steps == {"2", "4"}
    alora("train", str(config), "--resume")
    assert file.read_text() == first
    (tmp_path / "run" / "adapter").rename(tmp_path / "adapter")
    assert "holds a run that has begun" in refused("train", str(config))
    assert file.read_text() == first
    (tmp_path / "adapter").rename(tmp_path / "run" / "adapter")
    alora("analyze", str(tmp_path / "run"), "--out", str(tmp_path / "look"))
    assert "conflict" in (tmp_path / "look" / "report.html").read_text()


def test_answers_that_are_texts_are_judged_by_their_loss(tmp_path, jsonl):
    lines = [{"prompt": f"Say {i}.", "answer": f"the number {i} twice: {i} {i}", "task": "say"} for i in range(60)]
    jsonl.write_text(jsonl.read_text() + "\n" + "\n".join(json.dumps(line) for line in lines))
    out = alora("train", str(recipe(tmp_path, jsonl, test_size=12, max_length=64)))
    words, texts = out.split("answers in text")
    assert "│ even" in words and "│ say" not in words
    assert "│ even" not in texts
    loss, perplexity = map(float, re.search(r"│ say .*│ ([\d.]+) \(([\d.]+)\) │", texts).groups())
    assert perplexity == pytest.approx(2.718281828**loss, rel=1e-2)
    judged = alora("eval", str(tmp_path / "run" / "adapter"), "--base")
    assert f"{loss:.3f}" in judged and "base, untuned" in judged.split("answers in text")[1]


@pytest.mark.parametrize(
    ("answers", "texts"),
    [
        (["yes", "no"] * 20, False),
        ([f"label {i % 40}" for i in range(400)], False),  # many, each several times: words, however many
        (list("abc"), False),  # three rows say nothing
        ([f"answer {i}" for i in range(40)] + ["I do not know"] * 20, True),
    ],
)
def test_which_answers_are_texts(answers, texts):
    assert _are_texts(Counter(answers)) == texts


def test_labels_of_any_words(tmp_path, jsonl):
    """First tokens are shared, one word begins another, and one answer is seen in the test rows alone."""
    words = ["New", "New York", "New Jersey", "Nowhere"]
    write(jsonl, ({"prompt": f"City {i}?", "answer": words[i % 4], "task": "city"} for i in range(60)))
    test = ({"prompt": f"Town {i}?", "answer": a, "task": "city"} for i, a in enumerate([*words, "Newark"]))
    write(tmp_path / "test.jsonl", test)
    spec = f"[{{name: city, source: {jsonl}, test_split: test.jsonl}}]"
    out = alora("train", str(recipe(tmp_path, jsonl, tasks=spec, steps=30, learning_rate="1e-2", batch_size=16)))
    assert "test rows whose answer no training row has, counted as wrong: city 1" in out
    assert re.search(r"│ city │ +5 │ +20.0 % │", out)  # the majority is one of four words
    share = out.split("│ city")[1].split("│")[3].strip()
    assert f"│ {share} │" in alora("eval", str(tmp_path / "run" / "adapter"))

    job = load(load_recipe(tmp_path / "recipe.yaml"))
    trainer = train.trainer_for(job, save=False)
    trainer.train()
    rows = {row["prompt"]: row["answer"] for row in job.text["test"]}
    best = {}
    for row, prompt in zip(job.test, job.text["test"]["prompt"], strict=True):
        start = row["labels"].count(-100)
        scores = {}
        for word, ids in job.choices["city"].items():
            whole = torch.tensor([[*row["input_ids"][:start], *ids, job.tokenizer.eos_token_id]])
            with torch.no_grad():
                logits = job.model.eval()(whole, adapter_names=["city"]).logits[0].double().log_softmax(-1)
            scores[word] = float(logits[range(start - 1, whole.shape[1] - 1), whole[0, start:]].sum())
        best[prompt] = max(scores, key=scores.__getitem__)
    right = sum(best[prompt] == answer for prompt, answer in rows.items()) / 5
    assert judge(job, "x").accuracy == {"city": pytest.approx(right)}


def test_words_that_begin_others_need_an_end(tmp_path, jsonl, monkeypatch):
    write(jsonl, ({"prompt": f"City {i}?", "answer": ("New", "New York")[i % 2]} for i in range(20)))
    tokenizer = data.load_tokenizer("tiny-random")
    tokenizer.eos_token = None
    monkeypatch.setattr(data, "load_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(data, "load_model", lambda *_, **__: pytest.fail("loaded first"))
    assert "some of its label words begin others" in refused("train", recipe(tmp_path, jsonl))


def test_what_rows_lose_is_counted_by_train_and_eval(tmp_path, jsonl):
    again = [json.dumps({"prompt": "Number 3: is it even?", "answer": a, "task": "even"}) for a in ("yes", "no")]
    long = json.dumps({"prompt": "Number " + "9" * 300, "answer": "no", "task": "even"})
    jsonl.write_text("\n".join([jsonl.read_text(), *again, long]))
    spec = f"[{{name: parity, source: {jsonl}}}]"
    out = alora("train", str(recipe(tmp_path, jsonl, tasks=spec, test_size=60, train_size=20, max_length=96)))
    lines = [
        "repeated prompts left out: even 2 (with another answer: even 1)",
        "training rows taken (train_size): parity 20 of 83",
        "test rows taken, at most half of all: parity 40 of 60 asked for",
        "prompts cut in the middle to fit max_length=96: even 1 of ",
    ]
    assert all(line in out for line in lines)
    judged = alora("eval", str(tmp_path / "run" / "adapter"))
    assert all(line in judged for line in lines)


@pytest.mark.parametrize(("routing", "dtype"), [("task", "bfloat16"), ("soft", "float32")])
def test_demo_end_to_end(tmp_path, monkeypatch, routing, dtype):
    need_data("trec", "bbc")
    small = Recipe(
        tasks=demo_module.RECIPE.tasks, steps=2, batch_size=8, train_size=40, test_size=8, max_length=80, r=4
    )
    monkeypatch.setattr(demo_module, "RECIPE", small)
    monkeypatch.setattr("alora_kernels.recipes.demo.ROUNDS", 1)
    out = alora("demo", "--model", "tiny-random", "--routing", routing, "--output", str(tmp_path), "--dtype", dtype)
    assert "majority" in out
    assert "one generate call" in out
    assert ("__base__" in out) == (routing == "task")
    assert "PEFT LoRA, unfused" in out
    assert "authors' loop" in out
    assert "tokens/s in float32" in out and ("tokens/s in bfloat16" in out) == (dtype == "bfloat16")
    assert load_recipe(tmp_path / "adapter" / "recipe.yaml").dtype == dtype
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_other_bad_input(tmp_path):
    assert "must be 'task' or 'soft'" in refused("demo", "--routing", "hard")
    for given, hint in [("float16", "float16 is for serving"), ("bf16", "did you mean bfloat16?"), ("int8", "'int8'")]:
        said = refused("demo", "--dtype", given)
        assert "--dtype must be one of auto, float32, bfloat16, got" in said and hint in said
    (tmp_path / "r.yaml").write_text("tasks: [trek]\nmodel: tiny-random")
    assert "trek" in refused("train", str(tmp_path / "r.yaml"))
    (tmp_path / "empty").mkdir()
    assert "has no recipe.yaml: give the adapter folder" in refused("eval", str(tmp_path / "empty"))


def test_a_backend_that_cannot_run_is_one_line(tmp_path, jsonl, monkeypatch):
    monkeypatch.setenv("ALORA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "cannot run on cpu tensors" in refused("train", recipe(tmp_path, jsonl))
    assert "cannot run on cpu tensors" in alora("doctor")


def test_the_example_recipe_is_valid():
    assert load_recipe(Path(__file__).parents[2] / "examples" / "train.yaml").learning_rate == 1e-3


# ---- how tasks were asked: `alora train` writes it beside the adapter


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    rows = ({"n": i, "answer": "yes" if i % 2 else "no", "task": ("even", "odd")[i % 2]} for i in range(60))
    return write(tmp_path / "numbers.jsonl", rows)


def trained(tmp_path: Path, numbers: Path, **more: str) -> Path:
    spec = f"[{{name: parity, source: {numbers}, prompt: 'Is {{n}} odd? '}}, spam]"
    alora("train", recipe(tmp_path, numbers, tasks=spec, steps=1, batch_size=4, train_size=20, test_size=8, **more))
    return tmp_path / "run" / "adapter"


def test_train_writes_templates_label_words_and_a_public_sample(tmp_path: Path, numbers: Path):
    folder = trained(tmp_path, numbers)
    cards = read_task_cards(folder, ("even", "odd", "spam"))
    assert cards["even"].template == cards["odd"].template == "Is {n} odd?"
    assert cards["odd"].answers == ("yes",) and cards["even"].answers == ("no",)
    assert cards["even"].sample is None, "a row of the user's data left with the adapter"
    assert cards["spam"].template == TASKS["spam"].template and cards["spam"].answers == ("spam", "ham")
    head, tail = TASKS["spam"].template.split("{text}")
    assert cards["spam"].sample.startswith(head) and cards["spam"].sample.endswith(tail)


def test_a_lora_of_one_task_is_asked_as_in_its_training_too(tmp_path: Path, numbers: Path):
    spec = f"[{{name: parity, source: {numbers}, prompt: 'Is {{n}} odd?', task_column: null}}]"
    alora("train", recipe(tmp_path, numbers, tasks=spec, steps=1, batch_size=4, method="lora"))
    assert read_task_cards(tmp_path / "run" / "adapter", ("adapter",))["adapter"].template == "Is {n} odd?"


def test_a_method_whose_tasks_have_no_names_leaves_no_file(tmp_path: Path, numbers: Path):
    folder = trained(tmp_path, numbers, method="alora-soft")
    assert (folder / "adapter_config.json").exists() and not (folder / FILE).exists()


def test_a_task_that_several_files_could_have_named_is_asked_with_whole_prompts(numbers: Path):
    one, other = (TaskSpec(name, str(numbers), prompt=f"{name} {{n}}:") for name in ("a", "b"))
    assert task_cards([one], load_tasks([one], test_size=4), {})["even"] == TaskCard("a {n}:")
    both = task_cards([one, other], load_tasks([one, other], test_size=4), {"odd": ["yes"]})
    assert both == {"even": TaskCard("{prompt}"), "odd": TaskCard("{prompt}", ("yes",))}
