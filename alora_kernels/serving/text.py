"""Tokens become text while they arrive: no half characters, no part of a stop text, nothing of the prompt.

Each step's tokens give the text that is certain by now; the rest is held back. A character can take several tokens, and
a stop text can begin in one token and end three tokens later.
What a token says depends on those before it (a space, half a character), so the end of the prompt is decoded with the
answer, and what it says by itself is taken off. Where the prompt ends inside a character, that character is the
answer's first if the answer completes it, and the prompt's if not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from os.path import commonprefix
from typing import Any

CONTEXT = 4  # tokens of the prompt that are decoded with the answer, or more where these begin inside a character
FOLLOW = 4  # tokens after which a character that is not complete never will be: it has four bytes at most
BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not yet


class TextStream:
    """The text of one answer as it grows, which continues the token ids `prompt`; `stopped` by one of the stop texts.

    The tokenizer is a transformers tokenizer with a `tokenizers` backend. Of a `spaced` answer the first space is no
    part.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int] = (), stop: Iterable[str] = (), *, spaced: bool = False
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._ids = self._context(list(prompt))
        self._done = len(self._ids)  # tokens whose text is out, or is the prompt's
        self._said = [self._decode(self._ids)]  # what these said; for a prompt that ends inside a character, less too
        if self._said[0].endswith(BROKEN):
            self._said += [self._decode(self._ids[:-n]) for n in range(1, FOLLOW)]
        self._stop = tuple(stop)
        self._held, self._spaced = "", spaced
        self.stopped = False

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that became certain with these new tokens; nothing after a stop text."""
        for token in tokens:
            self._ids.append(token)
            self._held += self._certain()
        return self._release(done=False)

    def finish(self) -> str:
        """What was held back, once nothing more can come; half a character reads U+FFFD."""
        self._held += self._take(len(self._ids), self._text(len(self._ids)))
        return self._release(done=True)

    def of_tokens(self, ids: Iterable[int], after: Sequence[int]) -> list[str]:
        """What each token says after the last of others, a special one by its name; U+FFFD for half a character."""
        decode, texts = partial(self._backend.decode, skip_special_tokens=False), []
        before = str(decode(after[-1:]))
        for id in ids:
            both = str(decode([*after[-1:], id]))
            goes_on = both.startswith(before) and not before.endswith(BROKEN)
            texts.append(both[len(before) :] if goes_on else str(decode([id])))
        return texts

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def _context(self, prompt: list[int]) -> list[int]:
        """The last few tokens that begin with a character."""
        count = CONTEXT
        while count < len(prompt):
            text = self._decode(prompt[-count:])
            if text and not text.startswith(BROKEN):
                return prompt[-count:]
            count *= 2
        return prompt

    def _text(self, end: int) -> str:
        """The text of the first `end` tokens, always going on from what is out.

        A run of byte tokens that is not UTF-8 as a whole is all U+FFFD in some decoders, what was a character before
        included: such a run is decoded from the first token that is not out.
        """
        text = self._decode(self._ids[:end])
        if len(self._said) > 1 or text.startswith(self._said[0]):
            return text
        return self._said[0] + self._decode(self._ids[self._done : end])

    def _certain(self) -> str:
        """The text that later tokens cannot change any more, and is not out."""
        text, earlier = self._text(len(self._ids)), len(self._ids) - FOLLOW
        if not text.endswith(BROKEN):
            return self._take(len(self._ids), text)
        if earlier > self._done and text.startswith(before := self._text(earlier)):
            return self._take(earlier, before)
        return ""

    def _take(self, end: int, text: str) -> str:
        """Count the text of the first `end` tokens as out, and forget tokens that the next do not depend on."""
        new = text[max(len(commonprefix([said, text])) for said in self._said) :]  # noqa: RUF071, texts and not paths
        since = self._decode(self._ids[self._done : end])
        if since and not since.startswith(BROKEN):
            self._ids, end, text = self._ids[self._done :], end - self._done, since
        self._done, self._said = end, [text]
        return new

    def _release(self, done: bool) -> str:
        """The part of the held text that cannot belong to a stop text."""
        if self.stopped:
            return ""
        if self._held and self._spaced:
            self._held, self._spaced = self._held.removeprefix(" "), False
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if done else max((_overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
