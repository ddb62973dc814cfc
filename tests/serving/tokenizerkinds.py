"""Tokenizers of every kind that decodes in its own way, built in memory, over one small alphabet.

Real vocabularies differ in size only: what matters to streaming is how pieces become text.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "Héllo wörld 🌍🎉 — naïve 日本語, done.\n\nNext 👩‍👩‍👧 line"
WORDS = ["Héllo", "wörld", "naïve", "done", "Next", "line", "—", ",", ".", "H", "w", "a", "e", "1"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _alphabet() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


LETTERS = _alphabet()


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: a token per byte, and merges that cut characters (a space with the first byte of "日")."""
    letters = LETTERS
    space, first, second, _ = (LETTERS[byte] for byte in " 日".encode())
    merges = [(space, first), (space + first, second)]
    vocabulary = {piece: i for i, piece in enumerate([*letters, space + first, space + first + second])}
    one = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    one.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=one, **SPECIAL)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: pieces with "▁" for a space, and bytes for what has no piece."""
    pieces = ["<unk>", *BYTES, "▁", *"abcdefghijklmnopqrstuvwxyzHN.,"]
    one = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, fuse_unk=True, unk_token="<unk>"
        )
    )
    one.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    one.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=one, **SPECIAL)


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: whole words with "▁" before them."""
    pieces = ["<unk>", "▁", *sorted({*TEXT} - {" "}), *("▁" + word for word in WORDS)]
    one = Tokenizer(models.Unigram([(piece, -float(1 + (len(piece) < 3))) for piece in pieces], unk_id=0))
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    one.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=one, **SPECIAL)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: "##" goes on with a word, and a space before "." is taken away again."""
    letters = sorted({*TEXT} - {" ", "\n"})
    pieces = ["[UNK]", *WORDS, *letters, *("##" + letter for letter in letters)]
    one = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    one.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    one.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=one, **SPECIAL)


def word_ends() -> PreTrainedTokenizerFast:
    """The first GPT's kind: "</w>" ends a word, and is a space unless it ends the text."""
    letters = sorted({*TEXT} - {" ", "\n"})
    pieces = ["<unk>", *letters, *(letter + "</w>" for letter in letters)]
    one = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], end_of_word_suffix="</w>", unk_token="<unk>")
    )
    one.pre_tokenizer = pre_tokenizers.Whitespace()
    one.decoder = decoders.BPEDecoder(suffix="</w>")
    return PreTrainedTokenizerFast(tokenizer_object=one, **SPECIAL)


KINDS = {made.__name__: made() for made in (byte_level, byte_fallback, unigram, wordpiece, word_ends)}


def same(one: str, other: str) -> int:
    """Length of the beginning that both have."""
    return next(n for n in range(min(len(one), len(other)), -1, -1) if one[:n] == other[:n])


def added(tokenizer, prompt, tokens) -> str:
    """What the tokens add: the whole text without what the prompt says of it; half a character it says is nothing."""
    decode = tokenizer.backend_tokenizer.decode
    whole = decode([*prompt, *tokens])
    said = (decode(prompt[: len(prompt) - cut]) for cut in range(min(4, len(prompt) + 1)))
    return whole[max(same(one, whole) for one in said) :]
