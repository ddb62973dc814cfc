"""The README's first example runs as it stands, its loss is that of the rows alone; its recipe is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alora_kernels import data

from ..support.cli import alora

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_fifteen_lines_train_each_row_as_alone(monkeypatch):
    [code, *_] = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 20
    base, tokenizer = data.load_model("tiny-random")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: base)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    names: dict = {}
    exec(code, names)  # our own README
    model, texts, tasks = (names[name] for name in ("model", "texts", "tasks"))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "asymlora_B" in name:
                p.normal_(std=0.1)
        mixed = model(**names["batch"], labels=names["labels"], adapter_names=tasks).loss
        total, count = 0.0, 0
        for text, task in zip(texts, tasks, strict=True):
            row = tokenizer([text], return_tensors="pt")
            asked = row["input_ids"].shape[1] - 1
            total += asked * float(model(**row, labels=row["input_ids"], adapter_names=[task]).loss)
            count += asked
    assert float(mixed) == pytest.approx(total / count, rel=1e-5)


def test_the_recipe_is_read_and_its_rows_are_shown(tmp_path, monkeypatch):
    [recipe] = re.findall(r"```yaml\n(.+?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(recipe.replace("smollm2-135m", "tiny-random"))
    mails = [{"text": f"mail {i}", "folder": 3 + i % 2} for i in range(20)]
    (tmp_path / "mail.jsonl").write_text("\n".join(map(json.dumps, mails)))
    turns = [{"role": "user", "content": "a {}"}, {"role": "assistant", "content": "b {}"}]
    chats = [{"messages": [turn | {"content": turn["content"].format(i)} for turn in turns]} for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    monkeypatch.chdir(tmp_path)
    said = alora("data", "mine.yaml")
    assert "invoices" in said and "complaints" in said


def test_it_stays_a_page():
    assert len(README.splitlines()) <= 170
