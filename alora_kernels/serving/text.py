"""Tokens become text while they arrive: no half characters, no part of a stop text.

In:   the new tokens of one request.
Out:  the text that is certain by now; the rest is held back until it is.
Who:  the engine, once per request and step.

A character can take several tokens, and a stop text can begin in one token and end three tokens later. `tokenizers`
decodes in steps; here only what could still become a stop text is held back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

CONTEXT = 4  # prompt tokens the decoder sees first: whether a token begins with a space depends on what precedes it


class TextStream:
    """The text of one answer as it grows.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.
        prompt: token ids the answer continues.
        stop: texts that end the answer.

    Attributes:
        stopped: whether a stop text has come.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop: Iterable[str] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(ids=list(prompt[-CONTEXT:]), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that became certain with these tokens; nothing after a stop text.

        Args:
            tokens: new token ids.
        """
        if self.stopped:
            return ""
        self._held += "".join(self._decoder.step(self._backend, token) or "" for token in tokens)
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def finish(self) -> str:
        """What was held back, once nothing more can come."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def eos_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the model's own, or the tokenizer's."""
    for owner in (model.generation_config, model.config, tokenizer):
        eos = getattr(owner, "eos_token_id", None)
        if eos is not None:
            return [eos] if isinstance(eos, int) else list(eos)
    return []
