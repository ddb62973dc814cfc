"""Ten mistakes of newcomers: each is told in at most three lines that name the remedy."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from alora_kernels import data
from alora_kernels.data.models import byte_tokenizer
from tests.support.adapters import alora_folder, tiny_base
from tests.support.cli import alora, recipe
from tests.support.tiny import llama
from tests.support.toyrows import write


def trained(folder: Path, text: str, *more: object, code: int = 2) -> str:
    """What `alora train` says of a recipe with these lines."""
    write(folder / "rows.jsonl", [{"prompt": f"{i}:", "answer": ("ab", "a b")[i % 2]} for i in range(9)])
    (folder / "broken.csv").write_text("prompt,answer\na,b\nc, d,e\n")
    (folder / "r.yaml").write_text(f"model: tiny-random\noutput: {folder / 'run'}\n{text}\n")
    return alora("train", folder / "r.yaml", *more, code=code)


def not_empty(folder: Path) -> str:
    (folder / "run" / "adapter").mkdir(parents=True)
    (folder / "run" / "adapter" / "x").touch()
    return trained(folder, "tasks: [rows.jsonl]")


def other_base(folder: Path) -> str:
    adapter = alora_folder(folder / "adapter", tiny_base()[0], ["movie"])
    model = llama()
    model.save_pretrained(folder / "small")
    byte_tokenizer().save_pretrained(folder / "small")
    return alora("generate", adapter, "hello", "--model", folder / "small", code=2)


def taken_port(folder: Path) -> str:
    pytest.importorskip("uvicorn", reason="the server needs the extra `serving`")
    adapter = alora_folder(folder / "adapter", tiny_base()[0], ["movie"])
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        return alora("serve", "tiny-random", "--adapter", adapter, "--port", port, code=2)


MISTAKES: dict[str, tuple[Callable[[Path], str], str]] = {
    "key typo": (lambda f: trained(f, "tasks: [rows.jsonl]\nlearning_rat: 1"), "did you mean learning_rate?"),
    "missing column": (
        lambda f: trained(f, "tasks: [{name: a, source: rows.jsonl, prompt: '{text}:'}]"),
        "no column 'text'; present: prompt, answer",
    ),
    "wrong folder": (
        lambda f: alora("eval", trained_folder(f), code=2),
        "give the adapter folder that `alora train` or `demo` wrote",
    ),
    "words of the same tokens": (lambda f: trained(f, "tasks: [rows.jsonl]"), "choose other words"),
    "csv with a broken line": (lambda f: trained(f, "tasks: [broken.csv]"), "broken.csv, line 3"),
    "negative rate": (lambda f: trained(f, "tasks: [rows.jsonl]\nlearning_rate: -1"), "must be > 0, got -1"),
    "adapter of another base": (other_base, "give the base that it was trained on"),
    "folder not empty": (not_empty, "--overwrite replaces it, --output writes to another folder"),
    "port in use": (taken_port, "--port"),
}


def trained_folder(folder: Path) -> Path:
    """A folder of something else."""
    (folder / "pictures").mkdir()
    return folder / "pictures"


@pytest.mark.parametrize("kind", MISTAKES)
def test_it_is_told_in_three_lines(tmp_path, monkeypatch, kind):
    if kind.startswith("words"):  # a tokenizer that drops spaces
        blind: Any = byte_tokenizer()
        blind.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "")])
        monkeypatch.setattr(data.models, "_tiny_tokenizer", lambda: blind)
    act, remedy = MISTAKES[kind]
    said = act(tmp_path)
    assert remedy in said and said.strip().count("\n") < 3, said


def test_more_test_rows_than_rows_are_told_and_half_of_them_train(tmp_path):
    write(tmp_path / "rows.jsonl", [{"prompt": f"{i}:", "answer": ("yes", "no")[i % 2]} for i in range(20)])
    out = alora("train", recipe(tmp_path, tmp_path / "rows.jsonl", test_size=1000))
    assert "test rows taken, at most half of all: parity 10 of 1000 asked for" in out
