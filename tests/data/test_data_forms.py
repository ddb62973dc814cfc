"""What rows say: chats in both spellings, Alpaca, prompt and answer; rows of none or of several forms are named."""

from __future__ import annotations

import json

import pytest

from alora_kernels.data import Lost, TaskSpec, load_task, load_tasks, task_cards


def said(role, content):
    return {"role": role, "content": content}


def chat(*texts, system=None, **more):
    """A row whose user and assistant take turns."""
    turns = [said(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return {"messages": ([said("system", system)] if system is not None else []) + turns, **more}


def only(path, **spec):
    (row,) = load_task(TaskSpec("own", path, **spec), test_size=0)["train"]
    return row


def test_a_chat(jsonl):
    row = only(jsonl(chat("Hi", "Hello", "2 + 2?", "4 é")))
    assert (row["prompt"], row["answer"], row["task"]) == ("2 + 2?", "4 é", "own")
    assert json.loads(row["messages"]) == chat("Hi", "Hello", "2 + 2?", "4 é")["messages"]


def test_a_chat_of_share_gpt(jsonl):
    turns = [{"from": "system", "value": ""}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    row = only(jsonl({"id": 3, "conversations": turns}))
    assert json.loads(row["messages"]) == chat("Hi", "Hello")["messages"]


def test_a_chat_as_text_in_a_csv_file(tmp_path):
    import pandas as pd

    pd.DataFrame([{"messages": json.dumps(chat("Hi", "Hello")["messages"])}]).to_csv(tmp_path / "own.csv")
    assert only(str(tmp_path / "own.csv"))["answer"] == "Hello"


def test_the_turns_after_the_last_answer_teach_nothing(jsonl):
    assert json.loads(only(jsonl(chat("Hi", "Hello", "And?")))["messages"]) == chat("Hi", "Hello")["messages"]


def test_the_system_prompt_of_the_task_is_for_chats_without_one(jsonl):
    path = jsonl(chat("Hi", "Hello"), chat("Ho", "Hello", system="Own."), chat("Hu", "Hello", system=""))
    rows = load_task(TaskSpec("own", path, system="Short."), test_size=0)["train"]
    system = {row["prompt"]: json.loads(row["messages"])[0] for row in rows}
    assert system == {"Hi": said("system", "Short."), "Ho": said("system", "Own."), "Hu": said("system", "Short.")}


def test_chats_are_the_same_if_all_before_the_answer_is(jsonl):
    from alora_kernels.data import Lost

    lost = Lost()
    rows = [chat("Hi", "Hello"), chat("hi ", "Hullo"), chat("Hi", "Hello", system="S"), chat("Ho", "x", "Hi", "Hello")]
    assert load_task(jsonl(*rows), test_size=0, lost=lost)["train"].num_rows == 3
    assert lost.lines() == ["repeated prompts left out: own 1 (with another answer: own 1)"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "has no assistant's turn after a user's"),
        (chat("Hi"), "has no assistant's turn after a user's"),
        ({"messages": [said("assistant", "Hello")]}, "has no assistant's turn after a user's"),
        ({"messages": [said("assistant", "Hello"), said("user", "Hi")]}, "has no assistant's turn after a user's"),
        ({"messages": None}, "has no assistant's turn|list of turns"),
        ({"messages": "Hi"}, "expected a list of turns with role and content"),
        ({"messages": ["Hi"]}, "expected a list of turns with role and content"),
        ({"messages": [said("bot", "Hi")]}, "role must be one of human, gpt, system, user, assistant, tool, got 'bot'"),
        ({"messages": [{"role": "user"}]}, "content of user must be a text that is not empty, got 'None'"),
        (chat("Hi", " "), "content of assistant must be a text that is not empty"),
        ({"messages": [said("user", [{"type": "image"}])]}, "content of user must be a text"),
        ({"messages": [said("user", "a"), {**said("assistant", "b"), "weight": 0}]}, "a turn has weight, which is not"),
    ],
)
def test_bad_chats_name_their_line(jsonl, row, message):
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 2: .*({message})"):
        load_task(jsonl(chat("Hi", "Hello"), row), test_size=0)


def test_what_is_not_of_a_form_is_refused(jsonl):
    path = jsonl(chat("Hi", "Hello"))
    with pytest.raises(ValueError, match="task 'own': words: replaces answers of prompts, and its rows are chats"):
        only(path, words={"Hello": "Hi"})
    plain = jsonl({"prompt": "a", "answer": "b"}, name="plain.jsonl")
    with pytest.raises(ValueError, match="task 'own': system: is of chats, and its rows are prompt and answer"):
        only(plain, system="Short.")
    with pytest.raises(ValueError, match=r"present: text, note\. Name the columns.*prompt: 'Text: {text}.*messages"):
        only(jsonl({"text": "a", "note": "b"}))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (chat("Hi", "Hello"), {"prompt": "a", "answer": "b"}, "lacks messages.*It is prompt and answer, the first one"),
        ({"prompt": "a", "answer": "b"}, {"instruction": "a", "output": "b"}, "lacks prompt, answer.*It is Alpaca"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a"}, "lacks output, which the first one has; present"),
        ({"prompt": "a", "answer": "b", "task": "t"}, {"prompt": "c", "answer": "d"}, "lacks task"),
    ],
)
def test_mixed_forms_name_the_line(jsonl, first, second, message):
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 3: {message}"):
        load_task(jsonl(first, {**first}, second), test_size=0)


def test_alpaca(jsonl):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Sing.", "output": "La"}]
    loaded = load_tasks([jsonl(*rows)], test_size=0)
    prompts = {row["answer"]: row["prompt"] for row in loaded["train"]}
    assert prompts == {
        "3": "### Instruction:\nAdd.\n\n1 2\n\n### Response:",
        "La": "### Instruction:\nSing.\n\n### Response:",
    }
    card = task_cards([jsonl(*rows)], loaded, {})["own"]
    assert card.template.format(instruction="Add.\n\n1 2") == prompts["3"] and not card.chat
    own = only(jsonl(rows[0]), prompt="{instruction} {input}:", answer="{output}")  # its own templates win
    assert own["prompt"] == "Add. 1 2:"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (chat("Hi", "a", tools=[{"name": "clock"}]), "tools"),
        ({"instruction": "Add.", "output": "3", "history": [["Hi", "Hello"]]}, "history"),
    ],
)
def test_columns_that_would_be_lost_are_refused(jsonl, row, name):
    with pytest.raises(ValueError, match=rf"line 1: has {name}, which is not understood"):
        load_task(jsonl(row), test_size=0)
    assert only(jsonl(row | {name: []}))["answer"]


def test_nan_is_no_answer(jsonl):
    with pytest.raises(ValueError, match="has an empty answer"):
        load_task(jsonl({"prompt": "x", "answer": float("nan")}), test_size=0)


def test_chats_that_go_on_where_another_is_judged_are_not_trained(jsonl):
    lost = Lost()
    rows = [row for i in range(30) for row in (chat(f"Hi {i}", "a"), chat(f"HI  {i}", "a", "More?", f"b {i}"))]
    splits = load_tasks([jsonl(*rows)], test_size=10, validation_size=5, lost=lost)
    judged = {(row["messages"].count("user"), row["prompt"]) for s in ("test", "validation") for row in splits[s]}
    short = {prompt.casefold() for turns, prompt in judged if turns == 1}
    first = [" ".join(json.loads(row["messages"])[0]["content"].casefold().split()) for row in splits["train"]]
    assert short and not short & set(first)
    assert lost.held["own"] == 60 - 15 - len(first) > 0


def test_cards_of_chats(jsonl):
    same, many = (
        jsonl(chat("Hi", "a"), chat("Ho", "b")),
        jsonl(chat("Hi", "a", system="S"), chat("H", "b"), name="m.jsonl"),
    )
    specs = [TaskSpec("same", same, system="Short."), TaskSpec("many", many), TaskSpec("none", same)]
    specs.append(TaskSpec("some", many, system="Short."))  # of the rows that bring no own
    cards = task_cards(specs, load_tasks(specs, test_size=0), {"none": ["a", "b"]}, "{{ own }}")
    assert all(card.chat and card.template is None and card.sample is None for card in cards.values())
    systems = {"same": "Short.", "many": None, "none": None, "some": "Short."}
    assert {task: card.system for task, card in cards.items()} == systems
    assert cards["same"].chat_template == "{{ own }}" and cards["none"].answers == ("a", "b")
    assert task_cards(specs, load_tasks(specs, test_size=0), {})["same"].chat_template is None
