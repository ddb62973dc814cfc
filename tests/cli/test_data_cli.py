"""`alora data`: numbers by hand, rows with what is learnt marked, and no weights read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import normalizers
from typer.testing import CliRunner

from alora_kernels import data
from alora_kernels.cli.app import app
from alora_kernels.data.models import byte_tokenizer
from alora_kernels.recipes import display
from tests.support.toyrows import write

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def alora(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    monkeypatch.setattr(data.models, "_tiny_tokenizer", byte_tokenizer)  # a token is a byte


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A task of labels, with a long prompt, a repeated one and a contradiction, and a task of chats."""
    films = [{"prompt": f"film {i:02}:", "answer": "good" if i % 4 else "bad"} for i in range(16)]
    more = [{"prompt": "x" * 50 + ":", "answer": "good"}, films[1], {**films[2], "answer": "poor"}]
    write(tmp_path / "film.jsonl", [*films, *more])
    said = [
        [("user", "u" * (2 if i % 3 else 200)), ("assistant", f"a{i}"), ("user", "And?"), ("assistant", f"b{i}")]
        for i in range(30)
    ]
    write(tmp_path / "talk.jsonl", [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in said])
    path = tmp_path / "recipe.yaml"
    lines = ["model: tiny-random", "tasks: [film.jsonl, talk.jsonl]", "max_length: 110", "test_size: 4"]
    path.write_text("\n".join([*lines, "validation_size: 2", f"chat_template: {json.dumps(TEMPLATE)}"]))
    return path


def test_numbers_by_hand(recipe: Path):
    film, talk = json.loads(alora(recipe, "--json"))
    assert film["rows"] == {"train": 11, "test": 4, "validation": 2} and talk["rows"]["train"] == 24
    # " good" is five tokens of bytes, " bad" four, eos one
    assert film["tokens"] == {"p50": 14, "p95": 14, "longest": 57}
    assert (film["repeated"], film["contradicting"], film["too_long"], film["chats"]) == (2, 1, 0, False)
    assert sum(film["labels"].values()) == pytest.approx(1) and set(film["labels"]) <= {"good", "bad", "poor"}
    assert (talk["too_long"], talk["chats"], talk["labels"], talk["max_length"]) == (10, True, None, 110)
    # <user>uu 8, <assistant>a10 14, <user>And? 10, <assistant>b10 14; four ends of turns and three of lines
    assert talk["tokens"] == {"p50": 53, "p95": 53 + 198, "longest": 53 + 198}


def test_rows_are_shown_as_training_sees_them(recipe: Path):
    out = alora(recipe, "--rows", 30)
    assert "film answers: good" in out and "talk answers: texts" in out
    assert "[[ good<|eos|>]]" in out and "<user>uu<|eos|>\n<assistant>[[a1<|eos|>]]\n<user>And?" in out
    assert "uuu" not in out  # a chat that is left out
    assert "10 left out" in out and "2 (1)" in out and "repeated prompts left out: film 2" in out
    assert out.count("talk, training row") < 20 and out.count("film, training row") == 11
    assert alora(recipe, "--rows", 6).count("talk, training row") == 6


def test_one_task_and_no_rows(recipe: Path):
    out = alora(recipe, "--task", "talk", "--rows", 0)
    assert "film answers" not in out and "training row" not in out and "talk answers" in out
    assert "no such task has rows; did you mean talk?" in alora(recipe, "--task", "tolk", code=2)


def test_colours_on_a_terminal_instead_of_brackets(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    with (recipe.parent / "out").open("w") as file:
        console = Console(file=file, force_terminal=True, color_system="standard", width=160)
        monkeypatch.setattr(display, "console", console)
        alora(recipe, "--task", "film", "--rows", 1)
    out = (recipe.parent / "out").read_text()
    assert "[[" not in out and "\x1b[32m " in out


def test_what_training_would_refuse(recipe: Path):
    text = recipe.read_text()
    recipe.write_text(text.replace("110", "20"))
    assert "no chat of talk fits max_length=20: raise it" in alora(recipe, code=2)
    recipe.write_text("\n".join(line for line in text.splitlines() if "template" not in line))
    assert "task 'talk': this model's tokenizer has no chat template" in alora(recipe, code=2)
    recipe.write_text(text.replace("film.jsonl", "fill.jsonl"))
    said = alora(recipe, code=2)
    assert "fill.jsonl'; expected a .jsonl, .json, .csv or .parquet file" in said and said.count("\n") <= 3


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{name: a, source: film.jsonl, promt: '{prompt}'}", "tasks[0].promt: unknown setting; did you mean prompt?"),
        ("{name: a, source: 3}", "tasks[0].source: must be text, got 3"),
        ("{name: a, source: []}", "tasks[0].source: must not be empty"),
        ("{name: a, source: film.jsonl, validation_split: []}", "tasks[0].validation_split: must be text, got []"),
        ("{name: a, source: film.jsonl, validation_split: 2}", "are shares of the rows, such as 0.1"),
        ("{name: a, source: film.jsonl, answer: good}", "answer: 'good' names no column; write for example answer:"),
        (
            "{name: a, source: film.jsonl, answer: '{label}'}",
            "has no column 'label'; present: prompt, answer. Name the",
        ),
        ("{name: a, source: film.jsonl, system: Be short.}", "system: is of chats, and its rows are prompt and answer"),
        ("{name: a, source: broken.csv}", "broken.csv, line 3: has 3 fields, and line 1 names 2 columns; put a text"),
        ("{name: a, source: twice.jsonl}", "labels 'ab' and 'a b' are the same tokens to this tokenizer; choose other"),
    ],
)
def test_mistakes_of_newcomers_are_said_in_three_lines(recipe: Path, monkeypatch, task: str, message: str):
    write(recipe.parent / "twice.jsonl", [{"prompt": f"{i}:", "answer": ("ab", "a b")[i % 2]} for i in range(9)])
    (recipe.parent / "broken.csv").write_text("prompt,answer\na,b\nc, d,e\n")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "")])
    monkeypatch.setattr(data.models, "_tiny_tokenizer", lambda: tokenizer)
    recipe.write_text(f"model: tiny-random\ntasks: [{task}]\n")
    said = alora(recipe, code=2)
    assert message in said and said.count("\n") <= 3


def test_a_task_with_one_row_and_more_test_rows_than_rows(recipe: Path):
    write(recipe.parent / "one.jsonl", [{"prompt": "a:", "answer": "b"}])
    recipe.write_text("model: tiny-random\ntasks: [one.jsonl, film.jsonl]\ntest_size: 1000\n")
    out = alora(recipe, "--rows", 0)
    assert "at most half of all: one 0 of 1000 asked for, film 8 of 1000 asked for" in out


def test_without_a_max_length_it_is_the_models(recipe: Path):
    recipe.write_text(recipe.read_text().replace("max_length: 110\n", ""))
    assert "max_length allows 2048" in alora(recipe)
    assert json.loads(alora(recipe, "--json"))[0]["max_length"] == 2048
