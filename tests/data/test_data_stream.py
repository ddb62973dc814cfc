"""Streams: rows come as the table would have them, without those that judge, mixed by weights, and without an end."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import datasets
import pytest

from alora_kernels.data import Lost, TaskSpec, encode_splits, load_tasks, sources, stream


def rows(n, **more):
    return [{"prompt": f"{i} + {i} =", "answer": str(2 * i), **more} for i in range(n)]


def prompts(found, tokenizer):
    return [tokenizer.decode([i for i, label in zip(r["input_ids"], r["labels"]) if label < 0]) for r in found]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_every_row_comes_once_a_round_but_those_that_judge(kind, jsonl, tmp_path, monkeypatch, byte_tok):
    source = jsonl(*rows(250))
    if kind != "jsonl":
        source = str(tmp_path / "own.parquet")
        datasets.Dataset.from_list(rows(250)).to_parquet(source)
    if kind == "hub":
        path, load, source = source, datasets.load_dataset, "me/sums"
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda *_, split, streaming, **__: load("parquet", data_files=path, split=split, streaming=streaming),
        )
    text = load_tasks([TaskSpec("own", source)], test_size=10, validation_size=5, streaming=True)
    assert (text["test"].num_rows, text["validation"].num_rows) == (10, 5)
    endless = stream([TaskSpec("own", source)], text, byte_tok, seed=3)
    seen = prompts(islice(endless, 470), byte_tok)
    judge = set(text["test"]["prompt"]) | set(text["validation"]["prompt"])
    assert set(seen[:235]) == set(seen[235:]) == {row["prompt"] for row in rows(250)} - judge
    assert seen[:235] != sorted(seen[:235], key=lambda prompt: int(prompt.split()[0]))
    assert seen == prompts(islice(stream([TaskSpec("own", source)], text, byte_tok, seed=3), 470), byte_tok)
    other = stream([TaskSpec("own", source)], text, byte_tok, seed=4)
    assert seen != prompts(islice(other, 470), byte_tok)


def test_chats_that_go_on_where_another_is_judged_do_not_come(jsonl, byte_tok):
    short = [[{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "a"}] for i in range(30)]
    more = [{"role": "user", "content": "More?"}, {"role": "assistant", "content": "b"}]
    path = jsonl(*({"messages": turns} for turns in short), *({"messages": turns + more} for turns in short))
    text = load_tasks([path], test_size=10, streaming=True)
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    round_ = islice(stream([path], text, byte_tok, chat_template=template), 60)
    begins = Counter(byte_tok.decode(row["input_ids"]).partition(";")[0] for row in round_)
    assert not set(text["test"]["prompt"]) - {"More?"} & set(begins)


def test_rows_of_a_stream_are_as_those_of_a_table(jsonl, byte_tok):
    paths = [jsonl(*rows(9)), jsonl(*rows(9, task="b"), name="b.jsonl")]
    whole = load_tasks(paths, test_size=1)
    _, ids = encode_splits(whole, byte_tok, 12)
    found = list(islice(stream(paths, whole, byte_tok, 12), 40))
    table = {json.dumps(dict(row)) for row in ids["train"]}
    assert {json.dumps(row) for row in found} == table and len(table) == 16


def test_only_the_head_is_read_before(jsonl, monkeypatch):
    read, parse = [], sources._parse
    monkeypatch.setattr(sources, "_parse", lambda *args: read.append(args) or parse(*args))
    text = load_tasks([jsonl(*rows(5000))], test_size=10, streaming=True)
    assert len(read) <= 1011 and text["train"].num_rows == 1000


def test_weights_mix_tasks_and_sizes_do_not(jsonl, byte_tok):
    tasks = [jsonl(*rows(300), name="a.jsonl"), jsonl(*rows(12), name="b.jsonl")]
    text = load_tasks(tasks, test_size=2, streaming=True)
    even = Counter(row["task"] for row in islice(stream(tasks, text, byte_tok), 400))
    assert 150 < even["a"] < 250 and even.total() == 400
    more = Counter(row["task"] for row in islice(stream(tasks, text, byte_tok, weights={"a": 9}), 400))
    assert 330 < more["a"] < 385
    few = stream(tasks[:1], text, byte_tok, train_size=5)
    assert len({tuple(row["input_ids"]) for row in islice(few, 40)}) == 5


def test_what_rows_lose_is_counted_as_they_come(jsonl, byte_tok):
    path, lost = jsonl(*rows(20)), Lost()
    text = load_tasks([path], test_size=2, streaming=True)
    list(islice(stream([path], text, byte_tok, 8, lost=lost), 10))
    assert lost.cut["own"] > 0


def test_a_row_of_another_form_far_behind_is_named(jsonl, byte_tok):
    path = jsonl(*rows(1500), {"messages": []})
    text = load_tasks([path], test_size=2, streaming=True)
    with pytest.raises(ValueError, match=r"own\.jsonl, line 1501: lacks prompt, answer"):
        list(islice(stream([path], text, byte_tok), 3000))


def test_a_share_of_a_stream_is_refused(jsonl):
    with pytest.raises(ValueError, match=r"task 'own': a stream's length.*give a number of rows \(validation_size\)"):
        load_tasks([jsonl(*rows(20))], validation_size=0.1, streaming=True)


def test_class_names_of_a_stream(tmp_path, byte_tok):
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    table = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 1, 0]}, features=features)
    table.to_parquet(str(tmp_path / "own.parquet"))
    spec = TaskSpec("own", str(tmp_path / "own.parquet"), prompt="{text}:", answer="{label}")
    text = load_tasks([spec], test_size=0, streaming=True)
    assert dict(zip(text["train"]["prompt"], text["train"]["answer"])) == {
        "a:": "bad",
        "b:": "good",
        "c:": "good",
        "d:": "bad",
    }


def test_weights_are_of_entries(jsonl, byte_tok):
    text = load_tasks([jsonl(*rows(9))], test_size=1, streaming=True)
    with pytest.raises(ValueError, match="weights: other: a stream is weighed by entries of tasks, own"):
        stream([jsonl(*rows(9))], text, byte_tok, weights={"other": 2})
