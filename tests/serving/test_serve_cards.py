"""A task in the store knows how it was asked in training; a broken file costs a warning, never the task."""

from __future__ import annotations

from pathlib import Path

import pytest

from alora_kernels.adapters.cards import FILE, TaskCard, write_task_cards
from alora_kernels.serving import TaskStore
from tests.support.adapters import alora_folder, lora_folder, tiny_base

MATH, CODE = TaskCard("Sum: {text}\nResult:"), TaskCard("{prompt}", ("yes", "no"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = alora_folder(tmp_path / "adapter", tiny_base()[0], ("math", "code"))
    write_task_cards(folder, {"math": MATH, "unknown": CODE})
    return folder


def cards(store: TaskStore) -> dict[str, TaskCard | None]:
    return {task.name: task.card for task in store.tasks()}


def test_cards_follow_their_tasks_under_other_names_and_in_new_versions(folder: Path):
    with TaskStore.open(tiny_base()[0], [folder]) as store:
        assert cards(store) == {"math": MATH, "code": None}
        store.load(folder, name="sums", task="math")
        write_task_cards(folder, {"math": MATH, "code": CODE})
        store.load(folder, name="code", replace=True)
        assert cards(store) == {"math": MATH, "code": CODE, "sums": MATH}
        assert store.unload("sums").card == MATH


def test_a_stock_lora_has_the_only_card_of_its_folder(tmp_path: Path):
    folder = lora_folder(tmp_path / "renamed", tiny_base()[0])
    write_task_cards(folder, {"before": MATH})
    with TaskStore.open(tiny_base()[0], [folder]) as store:
        assert cards(store) == {"renamed": MATH}


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b'{"version": 1, "tasks": {"math": {"template": 1}}}'])
def test_a_broken_file_is_a_warning_and_every_task_is_served(folder: Path, caplog, content: bytes):
    (folder / FILE).write_bytes(content)
    with TaskStore.open(tiny_base()[0], [folder]) as store:
        assert cards(store) == {"math": None, "code": None}
        assert FILE in caplog.text
        assert store.acquire("math") is not None
