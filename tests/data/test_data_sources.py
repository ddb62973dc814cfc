"""A user's own task: JSON Lines files, hub data sets, and errors that name line, column and remedy."""

from __future__ import annotations

import json

import datasets
import pytest

from alora_kernels.data import Lost, TaskSpec, load_task, load_tasks
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
    monkeypatch.setattr(datasets, "load_dataset", lambda source, subset, split, **_: splits[split])
    return splits


def test_a_file_with_prompt_and_answer(jsonl):
    splits = load_task(jsonl(*rows(10)), test_size=4)
    assert splits["train"].num_rows == 6
    assert splits["test"].num_rows == 4
    assert splits["train"].column_names == ["prompt", "answer", "task", "messages"]
    assert set(splits["train"]["task"]) == {"own"}
    for prompt, answer in zip(splits["train"]["prompt"], splits["train"]["answer"], strict=True):
        assert int(answer) == 2 * int(prompt.split()[0])


def test_a_task_column_names_the_task_of_each_row(jsonl):
    path = jsonl(*rows(6, task="sums"))
    assert set(load_task(path, test_size=2)["test"]["task"]) == {"sums"}
    assert set(load_task(TaskSpec("mine", path, task_column=None), test_size=2)["test"]["task"]) == {"mine"}
    numbered = jsonl(*rows(10, task=0), *rows(10, task=None))
    assert set(load_task(numbered, test_size=0)["train"]["task"]) == {"0", "own"}


def test_templates_and_words(jsonl):
    path = jsonl(*[{"text": f"film {i} {{x}}", "score": i % 2, "more": {"who": "me"}} for i in range(6)])
    spec = TaskSpec(
        "film", path, prompt="{more[who]}: {text}\nSentiment: ", answer="{score}", words={"0": "bad", "1": "good"}
    )
    splits = load_task(spec, test_size=2)
    assert set(splits["train"]["answer"]) | set(splits["test"]["answer"]) == {"bad", "good"}
    assert splits["test"]["prompt"][0].startswith("me: film ")
    assert splits["test"]["prompt"][0].endswith("{x}\nSentiment:")  # trailing space goes: the answer brings its own


def named(jsonl, words, answers="aabbb", **sizes):
    """What rows lose whose answers are replaced by `words`."""
    lost = Lost()
    path = jsonl(*({"prompt": f"{i}:", "answer": answer} for i, answer in enumerate(answers * 3)))
    load_tasks([TaskSpec("mail", path, words=words)], test_size=2, lost=lost, **sizes)
    return lost.lines()


@pytest.mark.parametrize("sizes", [{}, {"train_size": 2}, {"train_size": 0}])
def test_a_misspelt_answer_in_words_is_refused(jsonl, sizes):
    answers = ["positive", "negative"]
    said = r"task 'mail': words: no row answers 'postive'; did you mean positive\?"
    with pytest.raises(ValueError, match=said):
        named(jsonl, {"postive": "good", "negative": "bad"}, answers, **sizes)
    with pytest.raises(ValueError, match="no row answers '3'; known are b, a"):
        named(jsonl, {"3": "good"}, "abbbb", **sizes)


def test_answers_that_words_leave_out_are_counted(jsonl):
    assert named(jsonl, {"a": "good", "b": "bad"}) == []
    assert named(jsonl, {"a": "b"}) == []  # an answer that is a word already needs no entry
    assert named(jsonl, {"a": "good"}) == ["rows whose answer has no entry in words:, it stays as it is: mail 'b' 9"]
    assert named(jsonl, {"a": "good"}, streaming=True)[0].endswith("mail 'b' 9")
    many = named(jsonl, {"a": "good"}, "abcdefghijkl")
    assert many[0].endswith("mail 'i' 3 and 3 more")


def test_an_entry_of_words_for_an_absent_class_is_said(jsonl):
    words = {"a": "good", "b": "bad", "c": "fair"}
    assert named(jsonl, words) == ["entries of words: that no row answers: mail 'c'"]
    assert named(jsonl, words, streaming=True) == []  # its head alone is known
    train, test = jsonl(*rows(6)), jsonl({"prompt": "x", "answer": "c"}, name="test.jsonl")
    lost = Lost()
    load_task(TaskSpec("mail", train, words={"c": "fair", **{str(i): "even" for i in range(0, 12, 2)}},
                       test_split=test), lost=lost)  # fmt: skip
    assert lost.lines() == []


def test_repeated_prompts_count_once_and_are_counted(jsonl):
    same = [{"prompt": "Hello  there", "answer": "a"}, {"prompt": "hello there ", "answer": "b"}]
    lost = Lost()
    assert load_task(jsonl(*same, *rows(3), *rows(3)), test_size=1, lost=lost)["train"].num_rows == 3
    assert lost.lines() == ["repeated prompts left out: own 4 (with another answer: own 1)"]


def test_the_same_prompt_under_two_tasks_counts_twice(jsonl):
    path = jsonl(*rows(6, task="sums"), *rows(6, task="doubles"))
    lost = Lost()
    splits = load_task(path, test_size=4, lost=lost)
    assert splits["train"].num_rows + splits["test"].num_rows == 12 and lost.lines() == []
    seen = [{(r["task"], r["prompt"]) for r in splits[split]} for split in ("train", "test")]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 12


def test_sources_of_one_task_share_no_prompt(jsonl):
    one, other = jsonl(*rows(12, task="sums"), name="a.jsonl"), jsonl(*rows(16, task="sums"), name="b.jsonl")
    lost = Lost()
    splits = load_tasks([one, other], test_size=2, lost=lost)
    train, test = (set(splits[split]["prompt"]) for split in ("train", "test"))
    assert not train & test and train | test == {row["prompt"] for row in rows(16)}
    assert lost.lines()[0] == "repeated prompts left out: sums 12"


@pytest.mark.parametrize(
    ("count", "asked", "train_size", "test", "train", "said"),
    [
        (40, 10, None, 10, 30, []),
        (40, 20, None, 20, 20, []),
        (40, 21, None, 20, 20, ["test rows taken, at most half of all: own 20 of 21 asked for"]),
        (40, 1000, None, 20, 20, ["test rows taken, at most half of all: own 20 of 1000 asked for"]),
        (41, 1000, None, 20, 21, ["test rows taken, at most half of all: own 20 of 1000 asked for"]),
        (2, 100, None, 1, 1, ["test rows taken, at most half of all: own 1 of 100 asked for"]),
        (1, 100, None, 0, 1, ["test rows taken, at most half of all: own 0 of 100 asked for"]),
        (40, 10, 8, 10, 8, ["training rows taken (train_size): own 8 of 40"]),
        (40, 1000, 8, 20, 8, ["training rows taken (train_size): own 8 of 40",
                              "test rows taken, at most half of all: own 20 of 1000 asked for"]),
        (40, 30, 0, 30, 0, []),
        (40, 10, 30, 10, 30, []),
    ],
)  # fmt: skip
def test_test_rows_are_at_most_half(jsonl, count, asked, train_size, test, train, said):
    path, lost = jsonl(*rows(count)), Lost()
    splits = load_task(path, test_size=asked, train_size=train_size, lost=lost)
    assert (splits["test"].num_rows, splits["train"].num_rows) == (test, train)
    assert lost.lines() == said
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
    if train_size != 0:
        assert splits["test"][:] == load_task(path, test_size=asked)["test"][:]


@pytest.mark.parametrize("few", [1, 2, 5])
def test_a_task_that_the_test_rows_hold_whole_trains_with_half_of_its_rows(jsonl, few):
    path = jsonl(*rows(20, task="often"), *[{"prompt": f"rare {i}", "answer": "x", "task": "rare"} for i in range(few)])
    held = 0
    for seed in range(40):
        lost = Lost()
        splits = load_task(path, test_size=12, seed=seed, lost=lost)
        counts = {split: list(splits[split]["task"]).count("rare") for split in ("train", "test")}
        assert counts["train"] + counts["test"] == few and counts["train"] >= 1
        assert splits["test"].num_rows == min(12, (20 + few) // 2) - lost.moved["rare"]
        assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
        if lost.moved:
            held += 1
            assert counts == {"train": few - few // 2, "test": few // 2}
            assert f"test rows trained on, their task has no others: rare {few - few // 2}" in lost.lines()
    assert held


def test_test_rows_of_a_task_that_is_not_trained_are_left_out(jsonl):
    train = jsonl(*rows(8, task="sums"), name="train.jsonl")
    test = jsonl(*rows(12, task="sums"), *rows(3, task="new"), name="test.jsonl")
    lost = Lost()
    splits = load_task(TaskSpec("own", train, test_split=test), test_size=5, lost=lost)
    assert set(splits["test"]["task"]) == {"sums"}
    left = sum(lost.untrained.values())
    assert splits["test"].num_rows == 5 - left
    with pytest.raises(ValueError, match="every prompt of .*train.jsonl' is a test prompt"):
        load_task(TaskSpec("own", train, test_split=jsonl(*rows(12, task="sums"), name="test.jsonl")), test_size=100)
    other = jsonl(*rows(3, task="new"), name="other.jsonl")
    lost = Lost()
    assert load_task(TaskSpec("own", train, test_split=other), lost=lost)["test"].num_rows == 0
    assert lost.lines() == ["test rows of tasks without training rows left out: new 3"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a", "answer": "b"}, "{oops"], r"line 2: not valid JSON"),
        ([{"prompt": "a", "answer": "b"}, "", "[1]"], r"line 3: expected a JSON object"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "c"}], r"line 2: lacks answer"),
        (
            [{"question": "a", "answer": "b"}],
            r"no column 'prompt'; present: question, answer.*task.s prompt and answer",
        ),
        ([], r"has no rows"),
        ([{"prompt": "a", "answer": None}], r"own\.jsonl, line 1 has an empty answer"),
        ([{"prompt": " ", "answer": "b"}], r"own\.jsonl, line 1 has an empty prompt"),
    ],
)
def test_bad_files(jsonl, lines, message):
    with pytest.raises(ValueError, match=message):
        load_task(jsonl(*lines), test_size=1)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "  \n\n"])
@pytest.mark.parametrize(
    ("line", "column"),
    [
        ('{"prompt": "a", "answer": "b"', 30),  # one past the last character
        ('{"prompt": "a" "answer": "b"}', 16),
        ('{"prompt": "é", answer: "b"}', 17),
        ("  {prompt", 4),
        ('{"prompt": "a", "answer": "b}', 27),
        ('{"prompt": "a"} x', 17),
    ],
)
def test_a_broken_line_is_named_with_its_column(tmp_path, line, column, end):
    good = json.dumps({"prompt": "a", "answer": "b"})
    path = tmp_path / "own.jsonl"
    path.write_text(f"\ufeff{good}\n\n{line}{end}", "utf-8", newline="")
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 3: not valid JSON \(.* at column {column}\)"):
        load_task(str(path), test_size=1)
    path = path.with_suffix(".json")
    path.write_text(f"[{good},\n\n{line}{end}", "utf-8", newline="")
    with pytest.raises(ValueError, match=rf"own\.json: not valid JSON \(.* at line 3, column ({column}|30)\)"):
        load_task(str(path), test_size=1)  # column 30: a text that nothing ends meets the line's end


def test_line_ends_within_a_text_do_not_end_its_line(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a\u2028b\x85c", "answer": "x"}\n' * 1, "utf-8")
    assert load_task(str(tmp_path / "own.jsonl"), test_size=0)["train"]["prompt"][0] == "a\u2028b\x85c"


def test_an_empty_column_names_a_line_of_the_file(tmp_path, jsonl):
    lines = ["", *[json.dumps({"prompt": f"{i}", "answer": None if i == 7 else "x"}) for i in range(9)]]
    with pytest.raises(ValueError, match=r"own\.jsonl, line 9 has an empty answer"):  # an empty line, 0 to 7
        load_task(jsonl(*lines), test_size=1)
    (tmp_path / "own.json").write_text(json.dumps([{"prompt": "a", "answer": ""}] * 2))
    with pytest.raises(ValueError, match=r"own\.json, item [12] has an empty answer"):
        load_task(str(tmp_path / "own.json"), test_size=1)


@pytest.mark.parametrize("prompt", ["{q[text]}", "{q[0]}", "{q.text}", "{n:d}", "{n!z}"])
def test_a_row_that_does_not_fit_its_template(jsonl, prompt):
    spec = TaskSpec("own", jsonl({"q": {}, "n": "x", "answer": "b"}), prompt=prompt)
    with pytest.raises(ValueError, match=r"own\.jsonl, line 1 does not fit the templates"):
        load_task(spec, test_size=0)


def test_a_list_in_a_json_file_reads_like_lines(tmp_path, jsonl):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(rows(10), indent=4))
    want, got = (load_task(p, test_size=4) for p in (jsonl(*rows(10)), str(path)))
    assert [got[split][:] for split in got] == [want[split][:] for split in want]


def test_csv_and_parquet_read_like_lines(tmp_path, jsonl):
    import pandas as pd

    frame = pd.DataFrame([{**row, "answer": f"{row['answer']}, or\nso"} for row in rows(10)])
    frame.to_csv(tmp_path / "own.csv", index=False)
    frame.to_parquet(tmp_path / "own.parquet")
    want = load_task(jsonl(*frame.to_dict("records")), test_size=4)
    for name in ("own.csv", "own.parquet"):
        got = load_task(str(tmp_path / name), test_size=4)
        assert [got[split][:] for split in got] == [want[split][:] for split in want]


def test_a_csv_file_keeps_texts_as_they_are_written(tmp_path):
    (tmp_path / "own.csv").write_text("prompt,answer\n007,NA\n1e3,null\n")
    train = load_task(str(tmp_path / "own.csv"), test_size=0)["train"]
    assert sorted(train["prompt"]) == ["007", "1e3"] and sorted(train["answer"]) == ["NA", "null"]


def test_class_names_of_a_parquet_file(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    table.to_parquet(str(tmp_path / "own.parquet"))
    spec = TaskSpec("own", str(tmp_path / "own.parquet"), prompt="{text}:", answer="{label}")
    assert sorted(load_task(spec, test_size=0)["train"]["answer"]) == ["bad", "good", "good"]


def test_several_files_are_one_task(tmp_path, jsonl):
    files = [jsonl(*rows(12)[part], name=name) for part, name in [(slice(5), "a.jsonl"), (slice(5, 9), "b.jsonl")]]
    (tmp_path / "c.csv").write_text("prompt,answer\n" + "\n".join(f"{r['prompt']},{r['answer']}" for r in rows(12)[9:]))
    datasets.Dataset.from_list(rows(13)[12:]).to_parquet(str(tmp_path / "d.parquet"))
    spec = TaskSpec("own", (*files, str(tmp_path / "c.csv"), str(tmp_path / "d.parquet")))
    assert sorted(load_task(spec, test_size=0)["train"]["prompt"]) == sorted(row["prompt"] for row in rows(13))
    other = jsonl({"messages": []}, name="e.jsonl")
    with pytest.raises(
        ValueError, match=r"e\.jsonl, line 1: lacks prompt, answer.*It is chat, the first one prompt and"
    ):
        load_task(TaskSpec("own", (files[0], other)), test_size=0)
    with pytest.raises(ValueError, match="a list of sources has files alone"):
        TaskSpec("own", (files[0], "me/sums"))


EMPTY = [(name, text, rf"{name}' has no rows") for name in ("own.jsonl", "own.json")
         for text in ("", "\n\n", "\ufeff", "\ufeff \n")]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *EMPTY,
        ("own.json", "[{", r"own\.json: not valid JSON .* column 3"),
        ("own.json", '[\n{"prompt": "a" "answer": 1}]', r"own\.json: not valid JSON .* at line 2, column"),
        ("own.json", '{"data": []}', r"own\.json: expected a list .* single value of dict"),
        ("own.json", '[{"prompt": "a", "answer": "b"}, 3]', r"item 2: expected a JSON object .* got '3'"),
        ("own.json", '[{"prompt": "a", "answer": "b"}, {"prompt": "a"}]', r"item 2: lacks answer"),
        ("own.json", "[]", "has no rows"),
        ("own.xlsx", "PK", r"own\.xlsx' is not a \.jsonl, \.json, \.csv or \.parquet file; convert it"),
        ("own.csv", "prompt,answer", "has no rows"),
        ("own.csv", "prompt,answer\na,b\n\nc,d,e\n", r"own\.csv, line 4: has 3 fields, and line 1 names 2.*quotes"),
        ("own.csv", 'prompt,answer\n"a\nb",c\nd\n', r"own\.csv, line 4: has 1 fields"),
        ("own.csv", 'prompt,answer\na,b\n"c,d\n', r"own\.csv, line 3: not valid CSV .* quotes closed"),
        ("own.csv", "prompt,prompt\na,b\n", r"own\.csv, line 1: names of columns must differ"),
        ("own.csv", "prompt;answer\na;b\n", r"no column 'prompt' and no column 'answer'; present: prompt;answer"),
        ("own.parquet", "PAR", r"own\.parquet does not read as parquet"),
        (
            "own.jsonl",
            json.dumps(rows(6)).encode("utf-16"),
            r"own\.jsonl is not UTF-8 text; save it as UTF-8",
        ),
    ],
)
def test_files_that_do_not_read(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path / name), test_size=1)


def test_a_file_that_is_not_there(jsonl):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_task("nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        load_task(TaskSpec("sums", jsonl(*rows(8)), test_split="gone.jsonl"))


@pytest.mark.parametrize("kind", ["file", "hub"])
def test_test_rows_of_their_own_are_taken_out_of_train(kind, jsonl, hub):
    train, test = jsonl(*rows(8), name="train.jsonl"), jsonl(*rows(3), name="test.jsonl")
    if kind == "hub":
        train, test = "me/sums", "dev"
        hub["train"], hub["dev"] = datasets.Dataset.from_list(rows(8)), datasets.Dataset.from_list(rows(3))
    splits = load_task(TaskSpec("sums", train, test_split=test), test_size=200)
    assert (splits["test"].num_rows, splits["train"].num_rows) == (3, 5)
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])


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


def test_a_hub_out_of_reach(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'me/sums' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError, match=r"'me/sums'.*HF_HUB_OFFLINE.*\.jsonl"):
        load_task("me/sums")


def test_a_hub_revision_reaches_the_hub(monkeypatch):
    asked = []

    def load(source, subset, split, revision, streaming):
        asked.append((source, subset, split, revision))
        return datasets.Dataset.from_list(rows(8) if split == "train" else rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load)
    spec = TaskSpec("sums", "me/sums", subset="small", revision="v2", test_split="dev", validation_split="valid")
    load_task(spec, test_size=0)
    assert asked == [("me/sums", "small", split, "v2") for split in ("train", "dev", "valid")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "yes"}, "answer: 'yes' names no column; write for example answer: '{answer}'"),
        ({"prompt": "Is it so?"}, "prompt: 'Is it so.' names no column"),
        ({"test_split": 1.0}, "shares of the rows.*got 1.0"),
        ({"validation_split": 0}, "shares of the rows.*got 0"),
        ({"test_split": 0.5, "validation_split": 0.5}, "leave some to train on; got 0.5, 0.5"),
        ({"split": "dev"}, "are a hub data set's: leave them out beside a file"),
        ({"revision": "main"}, "are a hub data set's"),
    ],
)
def test_specs_that_cannot_be_meant(fields, message):
    with pytest.raises(ValueError, match=message):
        TaskSpec("own", "own.jsonl", **fields)


@pytest.mark.parametrize("train_size", [None, 3])
def test_validation_rows_are_cut_off_after_the_test_rows(jsonl, train_size):
    path = jsonl(*rows(40))
    splits = load_task(path, test_size=10, validation_size=6, train_size=train_size)
    assert [splits[s].num_rows for s in ("train", "test", "validation")] == [train_size or 24, 10, 6]
    assert len({p for split in splits.values() for p in split["prompt"]}) == sum(s.num_rows for s in splits.values())
    assert splits["test"][:] == load_task(path, test_size=10)["test"][:]
    assert "validation" not in load_task(path, test_size=10)
    assert splits["validation"][:] == load_task(path, test_size=10, validation_size=6)["validation"][:]


def test_shares_take_the_place_of_sizes(jsonl):
    spec = TaskSpec("own", jsonl(*rows(40)), test_split=0.25, validation_split=0.1)
    mixed = load_tasks([spec], test_size=1)
    assert [mixed[split].num_rows for split in ("train", "test", "validation")] == [26, 10, 4]
    mixed = load_tasks([TaskSpec("own", spec.source, test_split=0.25)], test_size=1, validation_size=0.1)
    assert [mixed[split].num_rows for split in ("train", "test", "validation")] == [26, 10, 4]


def test_more_held_rows_than_there_are(jsonl):
    lost = Lost()
    splits = load_task(jsonl(*rows(12)), test_size=100, validation_size=100, lost=lost)
    assert [splits[split].num_rows for split in ("train", "test", "validation")] == [3, 6, 3]
    assert lost.lines() == [
        "test rows taken, at most half of all: own 6 of 100 asked for, own (validation) 3 of 100 asked for"
    ]
    lost = Lost()
    splits = load_task(jsonl(*rows(1)), test_size=100, validation_size=100, lost=lost)
    assert {split: rows.num_rows for split, rows in splits.items()} == {"train": 1, "test": 0}
    assert "own 0 of 100 asked for" in lost.lines()[0]


def test_rows_that_judge_from_a_file_of_their_own_are_left_out_of_training_and_counted(jsonl):
    train = jsonl(*rows(20), name="train.jsonl")
    test, valid = jsonl(*rows(3), name="test.jsonl"), jsonl(*rows(5), *rows(31)[30:], name="valid.jsonl")
    lost = Lost()
    splits = load_task(TaskSpec("own", train, test_split=test, validation_split=valid), lost=lost)
    assert [splits[split].num_rows for split in ("train", "test", "validation")] == [15, 3, 3]
    assert len({p for split in splits.values() for p in split["prompt"]}) == 21
    assert lost.lines() == [
        "repeated prompts left out: own 3",
        "training rows left out, they stand among the rows that judge: own 5",
    ]
    lost = Lost()
    splits = load_task(TaskSpec("own", train, test_split=test), test_size=2, lost=lost)
    assert splits["test"].num_rows == 2
    assert "(test_size, validation_size): own (test) 2 of 3" in lost.lines()[1]
    other = jsonl({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(ValueError, match=r"own\.jsonl': its rows are chat, those to train on prompt and answer"):
        load_task(TaskSpec("own", train, test_split=other))


def test_validation_rows_of_a_task_that_is_not_trained_are_left_out(jsonl):
    train, valid = jsonl(*rows(8, task="sums")), jsonl(*rows(9, task="new"), name="v.jsonl")
    lost = Lost()
    assert "validation" not in load_task(TaskSpec("own", train, validation_split=valid), test_size=2, lost=lost)
    assert lost.lines() == ["test rows of tasks without training rows left out: new 9"]
