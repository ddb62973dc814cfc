"""A user's own task: JSON Lines files, hub data sets, and errors that name line, column and remedy."""

from __future__ import annotations

import json

import datasets
import pytest

from alora_kernels.data import TaskSpec, load_task
from alora_kernels.data.sources import placeholders


@pytest.fixture
def jsonl(tmp_path):
    """A function that writes objects, or lines as they are, into a file and returns its path."""

    def write(*lines, name="own.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return str(path)

    return write


def rows(n, **more):
    return [{"prompt": f"{i} + {i} =", "answer": str(2 * i), **more} for i in range(n)]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: data sets by split, given by the test."""
    splits = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda source, subset, split: splits[split])
    return splits


def test_a_file_with_prompt_and_answer(jsonl):
    splits = load_task(jsonl(*rows(10)), test_size=4)
    assert splits["train"].num_rows == 6
    assert splits["test"].num_rows == 4
    assert splits["train"].column_names == ["prompt", "answer", "task"]
    assert set(splits["train"]["task"]) == {"own"}
    for prompt, answer in zip(splits["train"]["prompt"], splits["train"]["answer"], strict=True):
        assert int(answer) == 2 * int(prompt.split()[0])


def test_a_task_column_names_the_task_of_each_row(jsonl):
    path = jsonl(*rows(6, task="sums"))
    assert set(load_task(path, test_size=2)["test"]["task"]) == {"sums"}
    assert set(load_task(TaskSpec("mine", path, task_column=None), test_size=2)["test"]["task"]) == {"mine"}


def test_templates_and_words(jsonl):
    path = jsonl(*[{"text": f"film {i} {{x}}", "score": i % 2, "more": {"who": "me"}} for i in range(6)])
    spec = TaskSpec(
        "film", path, prompt="{more[who]}: {text}\nSentiment: ", answer="{score}", words={"0": "bad", "1": "good"}
    )
    splits = load_task(spec, test_size=2)
    assert set(splits["train"]["answer"]) | set(splits["test"]["answer"]) == {"bad", "good"}
    assert splits["test"]["prompt"][0].startswith("me: film ")
    assert splits["test"]["prompt"][0].endswith("{x}\nSentiment:")  # trailing space goes: the answer brings its own


def test_repeated_prompts_count_once(jsonl):
    same = [{"prompt": "Hello  there", "answer": "a"}, {"prompt": "hello there ", "answer": "b"}]
    assert load_task(jsonl(*same, *rows(3)), test_size=1)["train"].num_rows == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a", "answer": "b"}, "{oops"], r"line 2: not valid JSON"),
        ([{"prompt": "a", "answer": "b"}, "", "[1]"], r"line 3: expected a JSON object"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "c"}], r"line 2: lacks answer"),
        ([{"question": "a", "answer": "b"}], r"no column 'prompt'; present: question, answer.*TaskSpec"),
        ([], r"has no rows"),
        ([{"prompt": "a", "answer": None}], r"row 0 .* empty answer"),
        ([{"prompt": " ", "answer": "b"}], r"row 0 .* empty prompt"),
    ],
)
def test_bad_files(jsonl, lines, message):
    with pytest.raises(ValueError, match=message):
        load_task(jsonl(*lines), test_size=1)


def test_a_list_in_a_json_file_reads_like_lines(tmp_path, jsonl):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(rows(10), indent=4))
    want, got = (load_task(p, test_size=4) for p in (jsonl(*rows(10)), str(path)))
    assert [got[split][:] for split in got] == [want[split][:] for split in want]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", r"own\.json: not valid JSON .* column 3"),
        ('[\n{"prompt": "a" "answer": 1}]', r"own\.json: not valid JSON .* at line 2, column"),
        ('{"data": []}', r"own\.json: expected a list .* single value of dict"),
        ('[{"prompt": "a", "answer": "b"}, 3]', r"item 2: expected a JSON object .* got '3'"),
        ('[{"prompt": "a", "answer": "b"}, {"prompt": "a"}]', r"item 2: lacks answer"),
        ("[]", "has no rows"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(str(path), test_size=1)


def test_a_file_may_have_its_test_rows_in_another(jsonl):
    train, test = jsonl(*rows(8), name="train.jsonl"), jsonl(*rows(3), name="test.jsonl")
    splits = load_task(TaskSpec("sums", train, test_split=test), test_size=200)
    assert (splits["test"].num_rows, splits["train"].num_rows) == (3, 5)
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        load_task(TaskSpec("sums", train, test_split="gone.jsonl"))


def test_files_of_another_kind(jsonl):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_task("nowhere.jsonl")
    with pytest.raises(ValueError, match="to_json"):
        load_task(jsonl("prompt,answer", name="own.csv"))


def test_templates_are_checked():
    assert placeholders("{a} {b[0]} {c.d} {{literal}}", "{a}") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="literal braces"):
        placeholders("{a")
    with pytest.raises(ValueError, match="empty placeholder"):
        placeholders("{}")


def test_a_hub_data_set_reads_class_names(hub):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    hub["train"] = datasets.Dataset.from_dict(
        {"sentence": [f"s{i}" for i in range(9)], "label": [i % 2 for i in range(9)]}, features=features
    )
    spec = TaskSpec("sst2", "stanfordnlp/sst2", prompt="{sentence}:", answer="{label}")
    assert set(load_task(spec, test_size=3)["train"]["answer"]) == {"bad", "good"}

    hub["train"] = datasets.Dataset.from_dict({"sentence": ["s", "t"], "label": [-1, -1]}, features=features)
    with pytest.raises(ValueError, match="labelled split"):
        load_task(spec, test_size=1)


def test_a_test_split_of_its_own_takes_rows_out_of_train(hub):
    hub["train"] = datasets.Dataset.from_list(rows(8))
    hub["dev"] = datasets.Dataset.from_list(rows(3))
    splits = load_task(TaskSpec("sums", "me/sums", test_split="dev"), test_size=200)
    assert splits["test"].num_rows == 3
    assert splits["train"].num_rows == 5
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])


def test_a_hub_out_of_reach(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'me/sums' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError, match=r"'me/sums'.*HF_HUB_OFFLINE.*\.jsonl"):
        load_task("me/sums")
