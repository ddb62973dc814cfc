"""Which of its task's words a row is answered with: the likelihood of whole words, with few rows per forward.

In:   a row's prompt and the words' token ids; then, call after call, log-probabilities after a beginning.
Out:  the most likely word.
Who:  `evaluate.choice_accuracy`.

A log-probability is at most 0, so what is known of a word bounds the whole of it from above. The word with the highest
bound is looked at until it is known whole; then no other can be likelier. Words of one token need the prompt alone, and
so does every word whose first token is already out of the race.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from .rules import IGNORED

Word = tuple[int, ...]


def whole_words(words: Sequence[Sequence[int] | int], eos_token_id: int | None) -> list[Word]:
    """The words' tokens, each once; with the end of the text where one is the beginning of another.

    Of words none of which begins another, "the answer begins with it" holds for one at most, and the end adds nothing.

    Raises:
        ValueError: no words, a word without tokens, or one that begins another and no token for the end.
    """
    found = list(dict.fromkeys(tuple(w) if isinstance(w, Sequence) else (int(w),) for w in words))
    if not found or not all(found):
        raise ValueError("a task has no words to choose from, or a word no tokens: leave them out")
    begun = next(((a, b) for a, b in pairwise(sorted(found)) if b[: len(a)] == a), None)
    if begun is None:
        return found
    if eos_token_id is None:
        raise ValueError(
            f"the word of tokens {list(begun[0])} is the beginning of {list(begun[1])}, and nothing ends it: give "
            f"eos_token_id, a tokenizer with an end of text, or other words"
        )
    return [(*word, eos_token_id) for word in found]


class Question:
    """One row and what is known of its task's words.

    Args:
        row: encoded; the answer begins at the first label that follows a token.
        words: of its task, from `whole_words`.
        eos_token_id: ends every answer, where the rows have it.
        per_token: compare means over a word's tokens instead of sums.

    Attributes:
        context: tokens of a word after the prompt, to be judged next.
        right: the number of the right word; None if the row answers with none of them.
    """

    def __init__(
        self, row: Mapping[str, Any], words: Sequence[Word], eos_token_id: int | None, per_token: bool
    ) -> None:
        labels = as_list(row["labels"])
        start = first_label(labels) or 0
        self.task, self.prompt, self.words = row["task"], as_list(row["input_ids"])[:start], words
        self.context: Word = ()
        self._lengths = [len(word) if per_token else 1 for word in words]
        self._known = [0] * len(words)  # tokens of each word
        self._bounds = [0.0] * len(words)
        answer = tuple(label for label in labels[start:] if label != IGNORED)
        ended = [w if eos_token_id is None or w[-1] == eos_token_id else (*w, eos_token_id) for w in words]
        fits = [i for i, w in enumerate(ended) if answer[: len(w)] == w or answer == words[i]]
        self.right = max(fits, key=lambda i: len(words[i]), default=None)

    def learn(self, log_p: Tensor) -> int | None:
        """Take in log-probabilities `[1 + len(context), V]` of what follows the prompt and each token of the context.

        Returns:
            The number of the most likely word, if it is settled; else `context` is another one.
        """
        for i, word in enumerate(self.words):
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(word, self.context)))
            known = min(same + 1, len(word))
            if known > self._known[i]:
                total = log_p[torch.arange(known), list(word[:known])].double().sum()
                self._known[i], self._bounds[i] = known, float(total) / self._lengths[i]
        best = max(range(len(self.words)), key=lambda i: (self._bounds[i], self._known[i] == len(self.words[i])))
        self.context = self.words[best][:-1]
        return best if self._known[best] == len(self.words[best]) else None


def first_label(labels: Sequence[int]) -> int | None:
    """Position of the first label that follows a token; None without one."""
    return next((i for i, label in enumerate(labels) if i and label != IGNORED), None)


def as_list(values: Any) -> list[int]:
    """Ids as Python's, from a list, an array or a tensor."""
    return torch.as_tensor(values).tolist()
