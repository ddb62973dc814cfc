"""Text as it arrives: whole characters, nothing of a stop text, nothing of the prompt, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizerkinds import KINDS, LETTERS, TEXT, added, same

from alora_kernels.data import load_model
from alora_kernels.serving.text import TextStream

BROKEN = "\ufffd"
HALF = "half of ☀"


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("tiny-random")[1]


def in_steps(tokenizer, tokens, prompt=(), stop=()):
    stream = TextStream(tokenizer, prompt, stop)
    pieces = [stream.feed([token]) for token in tokens]
    return pieces, stream.finish(), stream


def answer(tokenizer, tokens, prompt=(), stop=()) -> str:
    pieces, rest, _ = in_steps(tokenizer, tokens, prompt, stop)
    return "".join(pieces) + rest


def test_the_pieces_are_the_text_and_no_piece_has_half_a_character(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    pieces, rest, _ = in_steps(tokenizer, ids)
    assert "".join(pieces) + rest == TEXT
    assert not any(BROKEN in piece for piece in pieces) and "" in pieces  # some tokens complete no character


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_goes_on_from_its_prompt_wherever_that_ends(kind):
    """Also inside a character, which is then the answer's; with special tokens around, and without a prompt."""
    tokenizer = KINDS[kind]
    ids = tokenizer(TEXT)["input_ids"]
    for cut in range(len(ids)):
        for prompt in (ids[:cut], [tokenizer.bos_token_id, *ids[:cut]], [*ids[:cut], *[tokenizer.bos_token_id] * 9]):
            pieces, rest, _ = in_steps(tokenizer, ids[cut:], prompt)
            assert "".join(pieces) + rest == added(tokenizer, prompt, ids[cut:]), (cut, prompt)
            assert not any(BROKEN in piece for piece in (*pieces, rest))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [(), ("ne",)])
def test_the_space_before_an_answer_is_no_part_of_it_and_of_others_it_is(kind, stop):
    tokenizer = KINDS[kind]
    prompt, whole = (tokenizer(text)["input_ids"] for text in ("Next:", "Next: done"))
    stream, plain = TextStream(tokenizer, prompt, stop, spaced=True), TextStream(tokenizer, prompt)
    said = "".join(stream.feed([token]) for token in whole[len(prompt) :]) + stream.finish()
    assert said == ("do" if stop else "done")
    # the first GPT's writes a space after a word, and so none before the answer
    assert plain.feed(whole[len(prompt) :]) + plain.finish() == " done"[kind == "word_ends" :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_tokens_are_the_text(kind):
    tokenizer = KINDS[kind]
    ids = tokenizer("Next: done , line")["input_ids"]
    stream, cut = TextStream(tokenizer), len(tokenizer("Next:")["input_ids"])
    said = "".join(*zip(*(stream.of_tokens([ids[at]], ids[:at]) for at in range(cut, len(ids)))))
    assert said.replace(" ", "") == "done,line" and said.startswith(" done"[kind == "word_ends" :])
    assert stream.of_tokens([tokenizer.eos_token_id], ids[:1])[0].strip() == "</s>"


def test_a_prompt_that_ends_inside_an_emoji_is_not_repeated(tokenizer):
    """The fault as it was seen: the answer began with "sunny " because the prompt's last token is a third of "☀"."""
    ids = tokenizer("It is sunny ☀ today")["input_ids"]
    cut = next(n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]).endswith(BROKEN))
    assert answer(tokenizer, ids[cut:], ids[:cut]) == "☀ today"
    other = tokenizer(" and warm")["input_ids"]
    assert answer(tokenizer, other, ids[:cut]) == " and warm"  # a character that is never completed is the prompt's
    assert answer(tokenizer, tokenizer(" a☀")["input_ids"], ids[:cut]) == " a☀"


def test_half_a_character_at_the_end_reads_as_a_tokenizer_reads_it(tokenizer):
    ids = tokenizer("Sun: ☀")["input_ids"][:-1]
    pieces, rest, _ = in_steps(tokenizer, ids)
    assert not any(BROKEN in piece for piece in pieces) and rest.endswith(BROKEN)
    assert "".join(pieces) + rest == tokenizer.decode(ids) == "Sun: " + BROKEN


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(min_size=1, max_size=24) | st.text(max_size=8).map(str.encode), cut=st.integers(0, 24))
def test_any_bytes_after_any_bytes(raw, cut):
    """A token is a byte here, so Python's own decoder knows the truth."""
    tokenizer, codes = KINDS["byte_level"], KINDS["byte_level"].get_vocab()
    ids = [codes[LETTERS[byte]] for byte in raw]
    whole = raw.decode(errors="replace")
    pieces, rest, _ = in_steps(tokenizer, ids[cut:], ids[:cut])
    assert "".join(pieces) + rest == whole[same(raw[:cut].decode(errors="replace"), whole) :]


@settings(max_examples=150, deadline=None)
@given(before=st.text(max_size=6), after=st.text(max_size=6), cut=st.integers(0, 3), junk=st.binary(max_size=3))
def test_bytes_that_are_no_text_spoil_neither_neighbour(before, after, cut, junk):
    """With byte fallback one wrong byte makes a decoder give up the characters on both sides."""
    tokenizer, codes = KINDS["byte_fallback"], KINDS["byte_fallback"].get_vocab()

    def ids(raw: bytes) -> list[int]:
        return [codes[f"<0x{byte:02X}>"] for byte in raw]

    def safe(text: str) -> str:
        return text.replace(BROKEN, "").strip()

    head, tail = safe(before).encode(), safe(after).encode()
    prompt = ids(head[: max(0, len(head) - cut)])
    assert answer(tokenizer, [*ids(head[len(prompt) :]), *ids(tail), codes["a"]], prompt) == added(
        tokenizer, prompt, [*ids(head[len(prompt) :]), *ids(tail), codes["a"]]
    )
    said = answer(tokenizer, [*ids(tail), codes["a"], *ids(junk), codes["b"]], [codes["a"]])
    assert said.startswith(tail.decode() + "a") and said.endswith("b")


@pytest.mark.parametrize(
    ("text", "stops", "shown", "rest"),
    [
        *(
            (TEXT, (stop, "never there"), TEXT[: TEXT.index(stop)], None)
            for stop in ("wörld", " done", "日本", "\n\n", "H")
        ),
        ("one two three four", ("four", "two", "three"), "one ", None),  # the first in the text
        ("so it was: STO", ("STOP",), "so it was: ", "STO"),  # only looked like one
        ("so: STOP" + HALF, ("STOP" + BROKEN,), "so: ", None),  # is there when the end sets it free
    ],
)
def test_a_stop_text_ends_the_answer_before_it_and_none_of_it_is_shown(tokenizer, text, stops, shown, rest):
    ids = tokenizer(text.removesuffix(HALF))["input_ids"]
    ids += tokenizer("☀")["input_ids"][:-1] if text.endswith(HALF) else []
    pieces, left, stream = in_steps(tokenizer, ids, stop=stops)
    assert stream.stopped == (rest is None)
    assert ("".join(pieces), left) == (shown, rest or "")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_stop_text_may_begin_with_the_character_that_the_prompt_began(kind):
    tokenizer = KINDS[kind]
    ids = tokenizer("done 日本 next")["input_ids"]
    decode = tokenizer.backend_tokenizer.decode
    cut = next(n for n in range(1, len(ids)) if decode(ids[:n]).endswith(BROKEN))
    pieces, rest, stream = in_steps(tokenizer, ids[cut:], ids[:cut], stop=("日本",))
    assert stream.stopped and "".join(pieces) + rest == ""
    pieces, rest, stream = in_steps(tokenizer, ids[cut:], ids[:cut], stop=("done",))  # the prompt's own text
    assert not stream.stopped and "".join(pieces) + rest == "日本 next"


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=30), stop=st.text(min_size=1, max_size=3), cut=st.integers(0, 30))
def test_any_text_with_any_stop(tokenizer, text, stop, cut):
    ids = tokenizer(text)["input_ids"]
    prompt, tokens = ids[:cut], ids[cut:]
    whole = added(tokenizer, prompt, tokens)  # some characters are normalised
    pieces, rest, stream = in_steps(tokenizer, tokens, prompt, stop=(stop,))
    out = "".join(pieces) + rest
    if stop in whole:
        assert stream.stopped and out == whole[: whole.index(stop)]
    else:
        assert not stream.stopped and out == whole
