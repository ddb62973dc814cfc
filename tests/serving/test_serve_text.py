"""Text as it arrives: whole characters, nothing of a stop text, the spaces of the original."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alora_kernels.data import load_model
from alora_kernels.serving.text import TextStream

TEXT = "Héllo wörld 🌍🎉 — naïve 日本語, done.\n\nNext line"


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("tiny-random")[1]


def in_steps(tokenizer, tokens, prompt=(), stop=()):
    stream = TextStream(tokenizer, prompt, stop)
    pieces = [stream.feed([token]) for token in tokens]
    return pieces, stream.finish(), stream


def test_the_pieces_are_the_text_and_no_piece_has_half_a_character(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    pieces, rest, _ = in_steps(tokenizer, ids)
    assert "".join(pieces) + rest == TEXT
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces  # some tokens complete no character


def test_an_answer_goes_on_from_its_prompt(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    for cut in range(1, len(ids)):
        head = tokenizer.decode(ids[:cut])
        if "\ufffd" not in head:
            pieces, rest, _ = in_steps(tokenizer, ids[cut:], prompt=ids[:cut])
            assert head + "".join(pieces) + rest == TEXT


@pytest.mark.parametrize("stop", ["wörld", " done", "日本", "\n\n", "H"])
def test_a_stop_text_ends_the_answer_before_it_and_none_of_it_is_shown(tokenizer, stop):
    ids = tokenizer(TEXT)["input_ids"]
    pieces, rest, stream = in_steps(tokenizer, ids, stop=(stop, "never there"))
    assert stream.stopped and rest == ""
    assert "".join(pieces) == TEXT[: TEXT.index(stop)]


def test_the_first_of_several_stop_texts_wins(tokenizer):
    ids = tokenizer("one two three four")["input_ids"]
    pieces, _, _ = in_steps(tokenizer, ids, stop=("four", "two", "three"))
    assert "".join(pieces) == "one "


def test_what_only_looked_like_a_stop_text_is_shown_in_the_end(tokenizer):
    ids = tokenizer("so it was: STO")["input_ids"]
    pieces, rest, stream = in_steps(tokenizer, ids, stop=("STOP",))
    assert not stream.stopped and rest == "STO" and "".join(pieces) == "so it was: "


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=30), stop=st.text(min_size=1, max_size=3))
def test_any_text_with_any_stop(tokenizer, text, stop):
    ids = tokenizer(text)["input_ids"]
    whole = "".join(in_steps(tokenizer, ids)[0])  # what the tokenizer makes of the text: some characters are normalised
    pieces, rest, stream = in_steps(tokenizer, ids, stop=(stop,))
    out = "".join(pieces) + rest
    if stop in whole:
        assert stream.stopped and out == whole[: whole.index(stop)]
    else:
        assert not stream.stopped and out == whole
