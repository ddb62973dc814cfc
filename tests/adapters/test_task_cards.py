"""`adapter_tasks.json`: what is written is read, hostile files cost a warning and nothing else, folders keep it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from alora_kernels.adapters import cards
from alora_kernels.adapters.cards import FILE, TaskCard, read_task_cards, write_task_cards
from alora_kernels.adapters.export import export_lora
from alora_kernels.adapters.import_lora import import_lora
from alora_kernels.adapters.writer import save_adapter

from ..support.tiny import adapted, llama

MATH = TaskCard("Sum: {a} + {b}\nResult:", (), "Sum: 1 + 1\nResult:")
CODE = TaskCard("Ist „{text}“ gut? 👍🏽\u200d\r\n\tWort:", ("ja", "nein"))


def test_what_is_written_is_read_and_nothing_to_say_is_no_file(tmp_path: Path):
    write_task_cards(tmp_path, {"math": MATH, "code": CODE})
    assert read_task_cards(tmp_path, ("code", "math", "more")) == {"math": MATH, "code": CODE}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    write_task_cards(tmp_path, {})
    assert not list(tmp_path.iterdir()) and read_task_cards(tmp_path, ("math",)) == {}


def test_a_card_that_could_not_be_read_back_is_left_out_with_a_warning(tmp_path: Path, caplog):
    write_task_cards(tmp_path, {"math": MATH, "code": TaskCard("{text", ("yes",))})
    assert "tasks['code'].template has braces" in caplog.text
    assert read_task_cards(tmp_path, ("code", "math")) == {"math": MATH}


def card(**fields: object) -> str:
    return json.dumps({"version": 1, "tasks": {"math": fields}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "does not read"),
        ("[" * 100_000, "does not read"),
        ("[1]", "must be an object whose 'tasks' is an object"),
        ('{"version": 1, "tasks": ["math"]}', "must be an object whose 'tasks' is an object"),
        ('{"version": 2, "tasks": {}}', "has version 2"),
        ('{"version": true, "tasks": {}}', "has version True"),
        ('{"tasks": {}}', "has version None"),
        ('{"version": 1, "tasks": {"math": "Sum:"}}', "tasks['math'] must be an object, not str"),
        (card(template=5), "tasks['math'].template must be a text"),
        (card(template=" \n"), "tasks['math'].template must be a text that is not empty"),
        (card(template="x" * 8193), "tasks['math'].template has more than 8192 characters"),
        (card(template="{text"), "tasks['math'].template has braces that do not match"),
        (card(sample=["a"]), "tasks['math'].sample must be a text"),
        (card(sample="\x1b]0;owned\x07"), "tasks['math'].sample has control characters"),
        (card(sample="\ud83d"), "tasks['math'].sample has control characters or halves of characters"),
        (card(answers="yes"), "tasks['math'].answers must be a list"),
        (card(answers=["yes", 1]), "tasks['math'].answers must be a text"),
        (card(answers=["a"] * 1025), "tasks['math'].answers must be a list of at most 1024"),
    ],
)
def test_a_file_that_is_not_ours_is_named_and_not_used(tmp_path: Path, caplog, content: str, said: str):
    (tmp_path / FILE).write_text(content)
    assert read_task_cards(tmp_path, ("math", "code")) == {}
    assert FILE in caplog.text and said in caplog.text and "delete it" in caplog.text
    assert caplog.text.rstrip("\n").isprintable()


def test_neither_a_huge_file_nor_a_pipe_nor_other_bytes_stop_the_reader(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(cards, "MAX_BYTES", 100)
    (tmp_path / FILE).write_text(card(template="x" * 200))
    assert read_task_cards(tmp_path, ("math",)) == {} and "longer than 100 bytes" in caplog.text
    (tmp_path / FILE).write_bytes(b"\xff\xfe\x00")
    assert read_task_cards(tmp_path, ("math",)) == {}
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    assert read_task_cards(tmp_path, ("math",)) == {} and "is no file" in caplog.text


def test_export_gives_each_folder_its_own_card_and_import_puts_them_together(tmp_path: Path):
    save_adapter(adapted(llama()), tmp_path / "adapter")
    write_task_cards(tmp_path / "adapter", {"math": MATH, "code": CODE})
    export_lora(tmp_path / "adapter", tmp_path / "out", tasks={"math": "sums", "code": "code"})
    assert read_task_cards(tmp_path / "out" / "sums", ("sums",)) == {"sums": MATH}
    (tmp_path / "out" / "sums").rename(tmp_path / "out" / "moved")
    import_lora([tmp_path / "out" / "moved", tmp_path / "out" / "code"], tmp_path / "back", names=["a", "b"])
    assert read_task_cards(tmp_path / "back", ("a", "b")) == {"a": MATH, "b": CODE}


def test_a_stale_card_does_not_survive_an_export_without_one(tmp_path: Path):
    save_adapter(adapted(llama()), tmp_path / "adapter")
    write_task_cards(tmp_path / "adapter", {"math": MATH})
    export_lora(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out/math" / FILE).exists() and not (tmp_path / "out/code" / FILE).exists()
    write_task_cards(tmp_path / "adapter", {})
    export_lora(tmp_path / "adapter", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/math" / FILE).exists()
