"""Token ids: the answer is never cut, the loss sees the answer alone, and the baseline counts right."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict

from alora_kernels.data import Lost, encode, first_tokens, majority_baseline, word_tokens


def dataset(*rows):
    return Dataset.from_dict(
        {"prompt": [r[0] for r in rows], "answer": [r[1] for r in rows], "task": [r[2] for r in rows]}
    )


@pytest.fixture(params=["bytes", "smollm2"])
def tokenizer(request):
    if request.param == "bytes":
        return request.getfixturevalue("byte_tok")
    return request.getfixturevalue("smollm2")[1]


def test_labels_are_the_answer_and_eos(tokenizer):
    data = encode(dataset(("Message: hi\nLabel:", "spam", "spam"), ("Topic:", "tech", "bbc")), tokenizer)
    assert data.column_names == ["input_ids", "attention_mask", "labels", "task"]
    assert data["task"][:] == ["spam", "bbc"]
    for row, (prompt, answer) in zip(data, [("Message: hi\nLabel:", "spam"), ("Topic:", "tech")], strict=True):
        learned = [i for i in row["labels"] if i != -100]
        assert row["labels"] == [-100] * (len(row["input_ids"]) - len(learned)) + learned
        assert row["input_ids"][-len(learned) :] == learned
        assert row["input_ids"][: -len(learned)] == tokenizer(prompt).input_ids  # what generate will see
        assert learned == [first_tokens([answer], tokenizer)[answer], tokenizer.eos_token_id]
        assert row["attention_mask"] == [1] * len(row["input_ids"])


@pytest.mark.parametrize("max_length", [3, 4, 7, 16, 96])
def test_the_answer_is_never_cut(tokenizer, max_length):
    prompt = "Review: " + "very " * 300 + "good\nSentiment:"
    (row,) = encode(dataset((prompt, "positive", "movie")), tokenizer, max_length=max_length)
    assert len(row["input_ids"]) == max_length
    assert row["labels"][-2:] == row["input_ids"][-2:]
    assert row["labels"][:-2] == [-100] * (max_length - 2)
    assert tokenizer.decode(row["input_ids"][-2:-1]) == " positive"


def test_a_long_prompt_keeps_its_head_and_its_cue(smollm2):
    tokenizer = smollm2[1]
    prompt = "Review: " + "very " * 300 + "good\nSentiment:"
    (row,) = encode(dataset((prompt, "positive", "movie")), tokenizer, max_length=20)
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith("Review: very")
    assert text.endswith("good\nSentiment: positive<|im_end|>")


def test_prompts_that_are_cut_are_counted(byte_tok):
    lost = Lost()
    table = dataset(("x" * 20, "tech", "bbc"), ("x" * 6, "tech", "bbc"), ("x" * 6, "spam", "spam"))
    encode(table, byte_tok, max_length=9, lost=lost)
    encode(table, byte_tok, max_length=9, lost=lost)
    assert lost.lines() == ["prompts cut in the middle to fit max_length=9: bbc 2 of 4"]
    encode(table, byte_tok, max_length=8, lost=(fits := Lost()))
    assert fits.lines() == ["prompts cut in the middle to fit max_length=8: bbc 1 of 2"]
    encode(table, byte_tok, max_length=7, lost=(less := Lost()))
    assert less.lines() == ["prompts cut in the middle to fit max_length=7: bbc 2 of 2, spam 1 of 1"]


def test_bos_and_no_eos(byte_tok):
    from tokenizers.processors import TemplateProcessing

    class WithBos(type(byte_tok)):
        """A tokenizer that puts bos in front, as Llama's does."""

    tok = WithBos(tokenizer_object=byte_tok.backend_tokenizer.from_str(byte_tok.backend_tokenizer.to_str()))
    tok.add_special_tokens({"bos_token": "<|pad|>"})
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tok.bos_token_id)]
    )
    (row,) = encode(dataset(("Topic: " + "x" * 50 + ":", "tech", "bbc")), tok, max_length=12)
    assert row["input_ids"][0] == tok.bos_token_id
    assert row["input_ids"].count(tok.bos_token_id) == 1
    assert [i for i in row["labels"] if i != -100] == list(first_tokens(["tech"], tok).values())


def test_errors_of_encode(byte_tok):
    data = dataset(("Topic:", "tech", "bbc"))
    with pytest.raises(TypeError, match="one split"):
        encode(DatasetDict(train=data), byte_tok)
    with pytest.raises(ValueError, match="lacks column answer; present: prompt, task"):
        encode(data.remove_columns("answer"), byte_tok)
    with pytest.raises(ValueError, match="takes 12 tokens with eos; raise max_length=12"):
        encode(dataset(("Topic:", "unheard-of", "bbc")), byte_tok, max_length=12)
    assert encode(data.select([]), byte_tok).num_rows == 0


def test_labels_that_begin_alike(byte_tok):
    with pytest.raises(ValueError, match="'foo' and 'bar' begin with the same token"):
        first_tokens(["foo", "bar"], byte_tok)


def test_words_of_any_tokens(tokenizer):
    words = word_tokens(["New", "New York", "foo", "bar", "foo"], tokenizer, cue="Where?\nCity:")
    assert list(words) == ["New", "New York", "foo", "bar"]
    for word, ids in words.items():
        (row,) = encode(dataset(("Where?\nCity:", word, "t")), tokenizer)
        assert [i for i in row["labels"] if i != -100] == [*ids, tokenizer.eos_token_id]
        assert tokenizer.decode(ids) == f" {word}"
    assert words["New York"][: len(words["New"])] == words["New"]
    assert word_tokens([], tokenizer) == {}


def test_words_that_are_the_same_tokens(byte_tok):
    from tokenizers import normalizers

    backend = byte_tok.backend_tokenizer.from_str(byte_tok.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="'yes' and 'Yes' are the same tokens"):
        word_tokens(["yes", "Yes"], type(byte_tok)(tokenizer_object=backend))


def test_majority_baseline_by_hand():
    train = dataset(("", "a", "t"), ("", "a", "t"), ("", "b", "t"), ("", "y", "u"), ("", "x", "u"))
    test = dataset(("", "a", "t"), ("", "b", "t"), ("", "b", "t"), ("", "a", "t"), ("", "a", "t"), ("", "x", "u"))
    assert majority_baseline(DatasetDict(train=train, test=test)) == {"t": 0.6, "u": 1.0}
    with pytest.raises(ValueError, match="no train rows for u"):
        majority_baseline(DatasetDict(train=train.select([0]), test=test))
