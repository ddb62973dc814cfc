"""What a task is asked: rendered as in training to the token, by its card; what has no place in it is refused."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from alora_kernels import data
from alora_kernels.adapters.asking import Prompt, chat_text, filled, prompt_of
from alora_kernels.adapters.cards import TaskCard, described

from ..serving.tokenizerkinds import KINDS

PLAIN = TaskCard("Review: {text}\nSentiment:", ("positive", "negative"))
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<answer>{% endif %}"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def with_bos(name: str):
    """A tokenizer whose every text begins with bos, and ends with eos, which no prompt of training does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = KINDS[name].__class__(tokenizer_object=KINDS[name].backend_tokenizer, bos_token="<s>", eos_token="</s>")
    ids = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    copy = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
    copy.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer.__class__(tokenizer_object=copy, bos_token="<s>", eos_token="</s>")


TOKENIZERS = KINDS | {"bytes": data.models.byte_tokenizer()}
TOKENIZERS |= {f"bos {name}": with_bos(name) for name in ("byte_level", "unigram")}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_has_the_tokens_that_training_saw_before_the_answer(name):
    tokenizer = TOKENIZERS[name]
    text = "Héllo line"
    rows = Dataset.from_dict({"prompt": [f"Next: {text}\nNext:"], "answer": ["done"], "task": ["t"], "messages": [""]})
    row = data.encode(rows, tokenizer, max_length=999)[0]
    trained = [id for id, label in zip(row["input_ids"], row["labels"]) if label == data.IGNORE]
    prompt = prompt_of(tokenizer, user(text), TaskCard("Next: {text}\nNext:"), task="t")
    assert prompt.ids(tokenizer) == trained and prompt.spaced
    assert ("bos" in name) == (trained[0] == tokenizer.bos_token_id is not None)
    assert Prompt(prompt.text).ids(tokenizer) == trained  # sent as it is


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (PLAIN.template, "a warm film", "Review: a warm film\nSentiment:"),
        (PLAIN.template, "Review: a warm film\nSentiment: \n", "Review: a warm film\nSentiment:"),
        (PLAIN.template, "Review: it: {text}", "Review: Review: it: {text}\nSentiment:"),
        ("{prompt}", "what? ", "what?"),
        ("A {{brace}} and {text}: ", "x", "A {brace} and x:"),
        ("A {{brace}} and {text}: ", "A {brace} and x:", "A {brace} and x:"),
        ("{text} is {text}", "odd", "odd is odd"),
        ("{text.__class__} and", "x", "x and"),
        ("{a} + {b} =", '{"a": 1, "b": 2.5}', "1 + 2.5 ="),
        ("{a} + {b} =", "1 + 2 =", "1 + 2 ="),
        ("{a}\n{b}", '{"a": null,\n"b": "x"}', "\nx"),
        ("{n:.2f} rounds to", "1.23 rounds to", "1.23 rounds to"),
        ("{n:>9999999999}", "x y", "x y"),  # all placeholder: whatever comes is the whole prompt
        ("Say it:", "Say it:", "Say it:"),
        ("{a[0]} or {a[1]}?", '{"a[0]": "x", "a[1]": "y"}', "x or y?"),
    ],
)
def test_a_text_goes_into_the_template_and_a_whole_prompt_stays(template, content, text):
    assert filled(template, content) == text


@pytest.mark.parametrize(
    ("template", "content", "said"),
    [
        ("{a} + {b} =", "1 and 2", 'it is asked with a, b: send a JSON object such as {"a": "...", "b": "..."}'),
        ("{a} + {b} =", '{"a": 1}', "asked with a, b"),
        ("{a} + {b} =", '{"a": 1, "b": 2, "c": 3}', "asked with a, b"),
        ("{a} + {b} =", "[1, 2]", "asked with a, b"),
        ("{a}\n{b}", "two\nlines", "asked with a, b"),
        ("{n:.2f} rounds to", "1.234", "forms numbers: send the whole prompt"),
        ("Say it:", "hi", "its prompt is always 'Say it:'"),
        (PLAIN.template, " \n", "the text is empty"),
    ],
)
def test_what_does_not_fill_a_template_is_told_what_would(template, content, said):
    with pytest.raises(ValueError, match="task 't': ") as caught:
        prompt_of(None, user(content), TaskCard(template), task="t")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "system", "content": "be short"}, *user("x")],
        [*user("x"), {"role": "assistant", "content": "y"}, *user("z")],
        [{"role": "assistant", "content": "y"}],
        [],
    ],
)
def test_other_turns_have_no_place_in_a_single_prompt_and_are_not_dropped(turns):
    with pytest.raises(
        ValueError, match=r"task 'movie' was trained on single prompts, .*Review.* send one user message"
    ):
        prompt_of(None, turns, PLAIN, task="movie")


def test_chats_take_the_cards_template_and_system_prompt_unless_the_asker_brings_one():
    tokenizer = data.models.byte_tokenizer()
    card = TaskCard(chat=True, chat_template=TEMPLATE, system="be short")
    mine = [{"role": "system", "content": "be long"}, *user("x")]
    assert prompt_of(tokenizer, user("x"), card) == Prompt("<system>be short<user>x<answer>", bos=False)
    assert prompt_of(tokenizer, mine, card).text == "<system>be long<user>x<answer>"
    tokenizer.chat_template = TEMPLATE.replace("answer", "own")
    assert prompt_of(tokenizer, user("x"), card).text.endswith("<answer>")
    for other in (None, TaskCard(), TaskCard(sample="x"), TaskCard(template="{text}:", chat=True)):
        assert prompt_of(tokenizer, user("x"), other).text == "<user>x<own>"
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "other"}
    assert prompt_of(tokenizer, user("x")).text == "<user>x<answer>"
    assert chat_text(tokenizer, user("x"), ask=False) == "<user>x"


def test_without_a_template_nothing_is_guessed():
    with pytest.raises(ValueError, match="no chat template: give one .* or send the whole prompt"):
        prompt_of(data.models.byte_tokenizer(), user("x"), TaskCard(chat=True))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no such turn') }}", "no such turn"),
        ("{% for m in messages %}", "refuses these turns"),
        ("{{ messages[9].content }}", "refuses these turns"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 10) | list }}", "refuses these turns"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% if false %}x{% endif %}", "makes nothing of these turns"),
    ],
)
def test_a_strangers_chat_template_that_fails_is_an_error_in_words(template, said):
    with pytest.raises(ValueError, match=said):
        chat_text(data.models.byte_tokenizer(), user("x"), template, ask=True)


@pytest.mark.parametrize("system", [None, "be short"])
def test_a_chat_has_the_tokens_that_training_saw_before_the_answer(system):
    tokenizer = data.models.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<answer>", "<assistant>")
    turns = [*([{"role": "system", "content": system}] if system else []), *user("x")]
    whole = json.dumps([*turns, {"role": "assistant", "content": "y"}])
    rows = Dataset.from_dict({"prompt": ["x"], "answer": ["y"], "task": ["t"], "messages": [whole]})
    row = data.encode(rows, tokenizer)[0]
    trained = [id for id, label in zip(row["input_ids"], row["labels"]) if label == data.IGNORE]
    prompt = prompt_of(tokenizer, user("x"), TaskCard(chat=True, system=system))
    assert prompt.ids(tokenizer) == trained and prompt.text.endswith("<user>x<assistant>") and not prompt.spaced


def test_how_a_task_is_asked_in_words():
    assert described(None) is described(TaskCard(sample="x")) is None
    assert described(PLAIN) == '"Review: {text}\\nSentiment:" with positive, negative'
    assert described(PLAIN, 1, 6) == '"Review…" with positi, ...'
    assert described(TaskCard(chat=True, system="be")) == 'chats after the system prompt "be"'
