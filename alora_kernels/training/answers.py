"""Answers that a model writes itself, in batches of mixed tasks, and how near they come to the right ones.

A model writes greedily, and nothing of its `generation_config` counts but the ends of an answer: a row gets the tokens
that it gets alone. Three measures of such an answer, each from 0 to 1:

    exact   SQuAD's: letter case, punctuation, articles and white space do not count; the sign and point of a number,
            symbols (x < 3 is not x > 3) and an answer of nothing else do
    rouge   ROUGE-1, ROUGE-2 and ROUGE-L as F1, without stemming, words of any alphabet
    number  the last number of both is equal, as GSM8K and LLM-Adapters count: 1,200 is 1200.0
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig

from ..routing import route
from .collator import TaskCollator
from .evaluate import Row, batches
from .output_head import without_dropout
from .rules import base_model

# Chinese and Japanese are written without spaces: a character is a word
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
ARTICLES = ("a", "an", "the")
INPUTS = ("input_ids", "attention_mask")  # that `generate` continues


class Written(NamedTuple):
    """What a model wrote after a prompt."""

    ids: list[int]  # without the token that ended it
    ended: bool  # by itself, and not by the limit


@torch.no_grad()
def written_answers(
    model: Any,
    prompts: Sequence[Row],
    *,
    tasks: Sequence[str] | None,
    ends: Sequence[int],
    max_tokens: int,
    pad_token_id: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda rows: None,
    how: Mapping[str, Any] = {"do_sample": False},
) -> list[Written]:
    """What the model writes after each prompt, in their order.

    Args:
        model: a causal language model of transformers, with or without adapters.
        prompts: `input_ids` and `task` of each; or instead of ids' names `adapter`, for PEFT's `adapter_names`.
        tasks: names in the order of the model's ids for task routing; None for a model that takes no ids.
        ends: tokens that end an answer.
        max_tokens: longest answer.
        pad_token_id: fills shorter rows.
        batch_size: rows that are written together; rows of similar length are.
        on_batch: called with the number of rows done, for a progress bar.
        how: further settings of `generate`.
    """
    collate = TaskCollator(pad_token_id, tasks or (), model=model)
    alone = collate.rules.leaks or not collate.rules.pad_left  # what stands beside a row would change it
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]["input_ids"]))
    found: list[Written] = []
    settings = GenerationConfig(
        **how, max_new_tokens=max_tokens, eos_token_id=list(ends) or None, pad_token_id=pad_token_id
    )
    with without_dropout(model), generating_by(model, settings):
        for _, same in groupby(order, key=lambda at: len(prompts[at]["input_ids"]) if alone else 0):
            for chunk, batch in batches(model, [prompts[at] for at in same], collate, batch_size):
                given: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch}
                if "adapter" in chunk[0]:
                    given["adapter_names"] = [row["adapter"] for row in chunk]
                with contextlib.nullcontext() if tasks is None else route(batch["task_ids"]):
                    out = model.generate(**given)
                found += [_until(ids, ends) for ids in out[:, given["input_ids"].shape[1] :].tolist()]
                on_batch(len(chunk))
    return [written for _, written in sorted(zip(order, found, strict=True))]


@contextlib.contextmanager
def generating_by(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """The model's settings, such as a repetition penalty, put aside: `generate` mixes them with those it is given."""
    holders: list[Any] = [model, base_model(model)]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = settings
        yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config


def _until(ids: list[int], ends: Sequence[int]) -> Written:
    end = next((at for at, token in enumerate(ids) if token in ends), None)
    return Written(ids[:end], end is not None)


def exact_match(answer: str, reference: str) -> float:
    """1 if both say the same, as the head of this file has it."""
    return float(_plain(answer) == _plain(reference))


def _plain(text: str) -> str:
    text = THOUSANDS.sub("", " ".join(unicodedata.normalize("NFC", text).casefold().split()))
    kept = "".join(
        character
        for before, character, after in zip(" " + text, text, text[1:] + " ", strict=False)
        if unicodedata.category(character)[0] != "P" or (after.isdigit() and (character == "-" or before.isdigit()))
    )
    return " ".join(word for word in kept.split() if word not in ARTICLES) or text


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F1 of shared words, of shared pairs of words, and of the longest common subsequence of words (Lin 2004)."""
    one, other = words_of(answer), words_of(reference)
    pairs = [list(pairwise(words)) for words in (one, other)]
    shared = (Counter(one) & Counter(other)).total(), (Counter(pairs[0]) & Counter(pairs[1])).total()
    return {
        "rouge": _f1(_common(one, other), len(one), len(other)),
        "rouge1": _f1(shared[0], len(one), len(other)),
        "rouge2": _f1(shared[1], len(pairs[0]), len(pairs[1])),
    }


def words_of(text: str) -> list[str]:
    """The words that ROUGE compares."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for at, candidate in enumerate(other, start=1):
            diagonal, best[at] = best[at], diagonal + 1 if word == candidate else max(best[at], best[at - 1])
    return best[-1]


def _f1(shared: int, *lengths: int) -> float:
    return 2 * shared / sum(lengths) if shared else 0.0


def number_match(answer: str, reference: str) -> float:
    """1 if the last numbers are equal."""
    number = last_number(answer)
    return float(number is not None and number == last_number(reference))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None without one."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
