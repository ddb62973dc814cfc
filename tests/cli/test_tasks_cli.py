"""`alora tasks`: what it prints, what it writes, how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from alora_kernels.adapters import tasks as arranging
from alora_kernels.adapters.cards import TaskCard, read_task_cards, write_task_cards
from alora_kernels.adapters.reader import read_adapter
from alora_kernels.cli import tasks
from tests.support.adapters import MLP, Mlp, alora_folder
from tests.support.cli import alora, refused


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = alora_folder(tmp_path / "adapter", Mlp(), ["movie", "[b]trec"], **MLP)
    write_task_cards(folder, {"movie": TaskCard(template="Review: {text}\nSentiment:"), "[b]trec": TaskCard(chat=True)})
    return folder


def test_help_names_every_command_and_the_rule_for_a_folder():
    text = alora("tasks", "--help")
    assert all(name in text for name in ("DIR", "list", "add", "remove", "rename", "join", "--out", "--overwrite"))
    assert {info.name or info.callback.__name__ for info in tasks.app.registered_commands} == set(tasks.COMMANDS)
    assert all(word in alora("tasks", "DIR", "add", "--help") for word in ("--like", "--seed", "--template", "--out"))
    assert all(word in alora("tasks", "DIR", "join", "--help") for word in ("--rank", "--prefix", "OTHER", "exact"))


def test_a_folder_alone_lists_its_tasks(adapter):
    text = alora("tasks", adapter)
    assert text == alora("tasks", adapter, "list")
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert list(rows) == ["movie", "[b]trec"]
    assert rows["movie"][:2] == [r"Review: {text}\nSentiment:", "0"] and rows["movie"][-1].startswith("[b]trec ")
    assert rows["[b]trec"][0] == "chat"


def test_tasks_come_and_go(adapter, tmp_path):
    text = alora("tasks", adapter, "add", "law", "--template", r"Law: {text}\nAnswer:", "--out", tmp_path / "three")
    assert "law begins with a random A" in text
    assert f"adapter saved: {tmp_path / 'three'}, 3 tasks: movie, [b]trec, law" in text
    assert read_task_cards(tmp_path / "three", ("movie", "law"))["law"].template == "Law: {text}\nAnswer:"
    assert "with the A of movie" in alora("tasks", tmp_path / "three", "add", "x", "--like", "movie", "--overwrite")
    alora("tasks", tmp_path / "three", "remove", "x", "[b]trec", "--overwrite")
    alora("tasks", tmp_path / "three", "rename", "movie", "film", "--overwrite")
    assert read_adapter(tmp_path / "three").tasks == ("film", "law")
    text = alora("tasks", adapter, "join", tmp_path / "three", "--out", tmp_path / "both")
    assert "4 tasks as one adapter with one B of rank 8" in text and text.count("exact") == 5
    text = alora("tasks", adapter, "join", adapter, "--prefix", "b-", "--rank", 1, "--out", tmp_path / "one")
    assert "b-movie" in text and "--rank 4" in text


def test_a_change_reads_the_adapter_once(adapter, monkeypatch):
    read = []
    monkeypatch.setattr(arranging, "read_adapter", lambda *args: read.append(args) or read_adapter(*args))
    alora("tasks", adapter, "rename", "movie", "film", "--overwrite")
    assert len(read) == 1


def test_mistakes_are_one_line(adapter, tmp_path):
    assert "has no task 'movi': did you mean movie?" in refused("tasks", adapter, "remove", "movi", "--overwrite")
    assert "has a task 'movie' already" in refused("tasks", adapter, "add", "movie", "--overwrite")
    assert "has a task '[b]trec' already" in refused("tasks", adapter, "rename", "movie", "[b]trec", "--overwrite")
    assert "no task left" in refused("tasks", adapter, "remove", "movie", "[b]trec", "--overwrite")
    assert "say overwrite (--overwrite)" in refused("tasks", adapter, "rename", "movie", "film")
    assert "the folder comes first: alora tasks DIR add" in refused("tasks", "add")
    assert "no such folder" in refused("tasks", tmp_path / "nothing")
    assert "has no adapter_config.json" in refused("tasks", tmp_path, "list")
    assert "--prefix" in refused("tasks", adapter, "join", adapter, "--out", tmp_path / "out")
