"""From the rows of `loading` to unpadded token ids with a loss on what the model is to say, for the trainer.

Ids begin exactly as the tokenizer encodes what the model sees when it generates. Behind a prompt come the answer's ids,
and eos where the tokenizer has one; in a chat every turn of the assistant is learnt, with the token that ends it.
`Lost` counts what rows lose on the way.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..adapters.asking import chat_text, special_tokens
from ..text import listed

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features
    from transformers import PreTrainedTokenizerBase

#: label of a token that the loss skips, as in torch and transformers
IGNORE = -100
BATCH = 1000  # rows whose ids are Python's numbers at one time
SHOWN = 8  # answers in a line
Ids = list[int]


@dataclass
class Lost:
    """What rows lose on their way from a source to token ids, by task, or by source where it is a whole one's."""

    repeated: Counter[str] = field(default_factory=Counter)  # rows left out: their task has the same prompt already
    contradicting: Counter[str] = field(default_factory=Counter)  # those of them with another answer
    held: Counter[str] = field(default_factory=Counter)  # training rows left out: they judge, from a file of their own
    limited: dict[str, tuple[int, int]] = field(default_factory=dict)  # training rows taken, of how many (`train_size`)
    capped: dict[str, tuple[int, int]] = field(default_factory=dict)  # test rows taken, of how many asked for (half)
    judged: dict[str, tuple[int, int]] = field(default_factory=dict)  # rows taken of files that judge, of how many
    answers: dict[str, Counter[str]] = field(default_factory=dict)  # of sources with `words`, as they stand there
    unnamed: Counter[str] = field(default_factory=Counter)  # source and answer that its `words` do not name
    unused: list[str] = field(default_factory=list)  # source and answer that its `words` name and no row has
    moved: Counter[str] = field(default_factory=Counter)  # test rows that train, since their task has no others
    untrained: Counter[str] = field(default_factory=Counter)  # test rows left out: their task has no training row
    cut: Counter[str] = field(default_factory=Counter)  # rows whose prompt lost its middle
    long: Counter[str] = field(default_factory=Counter)  # chats left out
    rewritten: Counter[str] = field(default_factory=Counter)  # an assistant's turns that are not trained
    encoded: Counter[str] = field(default_factory=Counter)  # rows turned into token ids
    max_length: int = 0  # tokens that rows may have; 0: any number

    def lines(self) -> list[str]:
        """One line for each kind of loss that occurred."""
        other = f" (with another answer: {_by(self.contradicting)})" if self.contradicting else ""
        cut, long = ({t: (n, self.encoded[t]) for t, n in counts.items()} for counts in (self.cut, self.long))
        said = {
            f"repeated prompts left out: {_by(self.repeated)}{other}": self.repeated,
            f"training rows left out, they stand among the rows that judge: {_by(self.held)}": self.held,
            f"training rows taken (train_size): {_of(self.limited)}": self.limited,
            f"test rows taken, at most half of all: {_of(self.capped, 'asked for')}": self.capped,
            f"rows taken of files and splits that judge (test_size, validation_size): {_of(self.judged)}": self.judged,
            f"rows whose answer has no entry in words:, it stays as it is: {_some(self.unnamed)}": self.unnamed,
            f"entries of words: that no row answers: {listed(self.unused, SHOWN)}": self.unused,
            f"test rows trained on, their task has no others: {_by(self.moved)}": self.moved,
            f"test rows of tasks without training rows left out: {_by(self.untrained)}": self.untrained,
            f"prompts cut in the middle to fit max_length={self.max_length}: {_of(cut)}": cut,
            f"chats of more than max_length={self.max_length} tokens left out: {_of(long)}": long,
            f"an assistant's earlier turns not trained, which the template writes anew later: {_by(self.rewritten)}": (
                self.rewritten
            ),
        }
        return [line for line, counts in said.items() if counts]


def _by(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _some(counts: Counter[str]) -> str:
    return listed((f"{name} {count}" for name, count in counts.most_common()), SHOWN)


def _of(counts: Mapping[str, tuple[int, int]], what: str = "") -> str:
    return ", ".join(f"{name} {count} of {total} {what}".rstrip() for name, (count, total) in counts.items())


def encode(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    lost: Lost | None = None,
    chat_template: str | None = None,
) -> Dataset:
    """Token ids of rows; labels are -100 except on the answer and its eos, or on the turns of a chat's assistant.

    A prompt that is too long loses its middle: its first words say what is asked, its last ones are the cue for the
    answer, which is never cut. A chat that is too long is left out. `lost` counts both.

    Args:
        dataset: string columns `prompt`, `answer`, `task` and perhaps `messages`, or a ValueError; a TypeError for a
            `DatasetDict`.
        max_length: most tokens of a row, None for any number; a ValueError if an answer leaves no room for a prompt.
        chat_template: in place of the tokenizer's own.

    Returns:
        A data set with `input_ids`, `attention_mask`, `labels` (each `[length]`, integers) and `task`.
    """
    return _encode(dataset, tokenizer, max_length, lost, chat_template)[0]


def encode_splits(
    text: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    lost: Lost | None = None,
    chat_template: str | None = None,
) -> tuple[DatasetDict, DatasetDict]:
    """The splits of `load_tasks` without the chats that are too long, and the same rows as `encode` gives them.

    A ValueError for a task that has no training row left.
    """
    from datasets import DatasetDict

    ids, kept = DatasetDict(), DatasetDict()
    for split, rows in text.items():
        ids[split], numbers = _encode(rows, tokenizer, max_length, lost, chat_template)
        kept[split] = rows if len(numbers) == len(rows) else rows.select(numbers)
    if gone := sorted(set(text["train"]["task"]) - set(kept["train"]["task"])):
        raise ValueError(f"no chat of {', '.join(gone)} fits max_length={max_length}: raise it, or shorten the chats")
    return kept, ids


def _encode(
    dataset: Dataset, tokenizer: Any, max_length: int | None, lost: Lost | None, template: str | None
) -> tuple[Dataset, list[int]]:
    """Encoded rows, and their numbers in the data set."""
    from datasets import Dataset, concatenate_datasets

    if not isinstance(dataset, Dataset):
        raise TypeError(f"expected one split, got {type(dataset).__name__}; call encode(splits['train'], tokenizer)")
    missing = [column for column in ("prompt", "answer", "task") if column not in dataset.column_names]
    if missing:
        raise ValueError(f"data set lacks column {', '.join(missing)}; present: {', '.join(dataset.column_names)}")
    parts, kept = [], []
    for start in range(0, max(len(dataset), 1), BATCH):
        found = encode_batch(dataset[start : start + BATCH], tokenizer, max_length, lost or Lost(), template)
        kept += [start + number for number in found.pop("number")]
        parts.append(Dataset.from_dict(found, features=features_of_ids()))
    return concatenate_datasets(parts), kept


def features_of_ids() -> Features:
    """Columns of `encode`."""
    from datasets import Features, List, Value

    columns = dict.fromkeys(("input_ids", "attention_mask", "labels"), List(Value("int64")))
    return Features({**columns, "task": Value("string")})


def encode_batch(
    rows: Mapping[str, Sequence[str]], tokenizer: Any, max_length: int | None, lost: Lost, template: str | None
) -> dict[str, list[Any]]:
    """Columns of `encode` for columns of text, and the `number` of each row that is left."""
    lost.max_length = max_length or 0
    lost.encoded.update(rows["task"])
    chats = [number for number, turns in enumerate(rows.get("messages", ())) if turns]
    plain = sorted(set(range(len(rows["task"]))).difference(chats))
    found: dict[int, tuple[Ids, Ids] | None] = {}
    for numbers, encoded in ((plain, _plain_rows), (chats, partial(_chat_rows, template=template))):
        part = {column: [rows[column][number] for number in numbers] for column in rows}
        ids = encoded(part, tokenizer, max_length=max_length, lost=lost) if numbers else ()
        found.update(zip(numbers, ids, strict=True))
    kept = [(number, row) for number, row in sorted(found.items()) if row is not None]
    return {
        "input_ids": [ids for _, (ids, _) in kept],
        "attention_mask": [[1] * len(ids) for _, (ids, _) in kept],
        "labels": [labels for _, (_, labels) in kept],
        "task": [rows["task"][number] for number, _ in kept],
        "number": [number for number, _ in kept],
    }


def _plain_rows(
    rows: Mapping[str, list[str]], tokenizer: Any, *, max_length: int | None, lost: Lost
) -> list[tuple[Ids, Ids] | None]:
    """Ids and labels of `prompt + " " + answer + eos`."""
    before = _ids(rows["prompt"], tokenizer)
    ends = _answer_ids(rows["prompt"], rows["answer"], before, tokenizer)
    bos = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found: list[tuple[Ids, Ids] | None] = []
    for prompt, end, answer, task in zip(before, ends, rows["answer"], rows["task"], strict=True):
        end = end + eos
        room = len(prompt) if max_length is None else max_length - len(bos) - len(end)
        if room < 1 and max_length is not None:
            raise ValueError(f"answer {answer[:40]!r} takes {len(end)} tokens with eos; raise max_length={max_length}")
        if len(prompt) > room:
            lost.cut[task] += 1
            head = room // 4
            prompt = prompt[:head] + prompt[len(prompt) - (room - head) :]
        start = bos + prompt
        found.append((start + end, [IGNORE] * len(start) + end))
    return found


def _chat_rows(
    rows: Mapping[str, list[str]], tokenizer: Any, *, max_length: int | None, template: str | None, lost: Lost
) -> list[tuple[Ids, Ids] | None]:
    """Ids and labels of chats; None for those that are too long."""
    if not tokenizer.is_fast:
        raise ValueError("chats need a fast tokenizer, which tells where in a text its tokens stand; this one is slow")
    chats = []
    for messages, task in zip(rows["messages"], rows["task"], strict=True):
        try:
            chats.append(_render(json.loads(messages), tokenizer, template))
        except ValueError as error:
            raise ValueError(f"task {task!r}: {error}") from None
    whole = tokenizer(
        [chat.text for chat in chats], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    special = set(special_tokens(tokenizer).values())
    found: list[tuple[Ids, Ids] | None] = []
    for chat, ids, offsets, task in zip(chats, whole.input_ids, whole.offset_mapping, rows["task"], strict=True):
        ids, labels, trained = _label(chat, ids, [start for start, _ in offsets], special, tokenizer)
        if ids[-1] not in special and tokenizer.eos_token_id is not None:  # nothing else would tell the model to stop
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        fits = max_length is None or len(ids) <= max_length
        lost.long[task] += not fits
        lost.rewritten[task] += (chat.turns - trained) * fits
        found.append((ids, labels) if fits else None)
    lost.long, lost.rewritten = +lost.long, +lost.rewritten  # without zeros
    return found


@dataclass(frozen=True)
class _Chat:
    text: str  # up to the end of the last answer, without the space behind it
    answers: list[tuple[str, str]]  # what the model sees before a turn of its own, and the same with that turn
    turns: int  # of the assistant


def _render(turns: list[dict[str, str]], tokenizer: Any, template: str | None) -> _Chat:
    """A chat as text; a ValueError where the model would be asked in another way than its answer was written.

    Of earlier answers those are left out that the template writes in another way once the chat goes on.
    """
    text = chat_text(tokenizer, turns, template, ask=False).rstrip()
    first = next(number for number, turn in enumerate(turns) if turn["role"] == "user")
    places = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number > first]
    answers = []
    for number in places:
        before = chat_text(tokenizer, turns[:number], template, ask=True)
        through = chat_text(tokenizer, turns[: number + 1], template, ask=False).rstrip()
        if through.startswith(before) and len(through) > len(before) and text.startswith(through):
            answers.append((before, through))
    if not answers or answers[-1][1] != text:
        raise ValueError(
            f"the chat template asks with {before[-30:]!r} at the end, and writes answers in another way: give one that"
            " does not, by chat_template:"
        )
    return _Chat(text, answers, sum(turn["role"] == "assistant" for turn in turns))


def _label(chat: _Chat, ids: Ids, at: list[int], special: set[int], tokenizer: Any) -> tuple[Ids, Ids, int]:
    """A chat's ids, its labels, and how many turns they train; `at` has the place of each token in the text.

    Where an answer makes the tokenizer divide the text before it in another way, the model will not see it so: then the
    last answer alone is trained, behind the ids that it will see.
    """
    cuts = []  # the last special token before an answer, where tokenizers begin anew, and the answer's first token
    for before, _ in chat.answers:
        end = bisect_left(at, len(before))
        cuts.append((next((i for i in range(end - 1, 0, -1) if ids[i] in special), 0), end))
    tails = [before[at[start] if start else 0 :] for (before, _), (start, _) in zip(chat.answers, cuts, strict=True)]
    seen = _ids(tails, tokenizer)
    start, end = cuts[-1]
    if ids[start:end] != seen[-1]:
        answer = _ids([chat.text[len(chat.answers[-1][0]) :]], tokenizer)[0]
        asked = ids[:start] + seen[-1]
        return asked + answer, [IGNORE] * len(asked) + answer, 1
    labels, trained = [IGNORE] * len(ids), 0
    for (_, through), (start, end), tail in zip(chat.answers, cuts, seen, strict=True):
        if ids[start:end] == tail:
            last = bisect_left(at, len(through))
            labels[end:last] = ids[end:last]
            trained += 1
    return ids, labels, trained


def word_tokens(
    labels: Iterable[str], tokenizer: PreTrainedTokenizerBase, cue: str = "Answer:"
) -> dict[str, tuple[int, ...]]:
    """Ids of each label after a space, as `encode` puts them after the prompt `cue`: label -> ids, without eos.

    A ValueError for two labels of the same tokens: no model could tell them apart.
    """
    words = list(dict.fromkeys(labels))
    cues = [cue] * len(words)
    found = _answer_ids(cues, words, _ids(cues, tokenizer), tokenizer)
    taken: dict[tuple[int, ...], str] = {}
    for word, ids in zip(words, map(tuple, found), strict=True):
        if taken.setdefault(ids, word) != word:
            raise ValueError(
                f"labels {taken[ids]!r} and {word!r} are the same tokens to this tokenizer; choose other words, e.g. "
                f"with TaskSpec(words={{{word!r}: ...}})"
            )
    return {word: ids for ids, word in taken.items()}


def first_tokens(labels: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Id of each label's first token, for whoever has the model choose by one; a ValueError where two begin alike."""
    taken: dict[int, str] = {}
    for label, (first, *_) in word_tokens(labels, tokenizer).items():
        if taken.setdefault(first, label) != label:
            raise ValueError(
                f"labels {taken[first]!r} and {label!r} begin with the same token {tokenizer.decode([first])!r}; "
                f"choose other words, e.g. with TaskSpec(words={{{label!r}: ...}})"
            )
    return {label: first for first, label in taken.items()}


def _answer_ids(
    prompts: list[str], answers: list[str], before: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Ids of each `" " + answer` as they follow its prompt, whose ids are `before`.

    Some tokenizers treat the start of a text in their own way (a sentencepiece one puts a space there), so an
    answer is encoded with its prompt. Where that changes the prompt's own ids, it is encoded alone.
    """
    both = _ids([f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)], tokenizer)
    return [
        whole[len(start) :] if whole[: len(start)] == start else _ids([f" {answer}"], tokenizer)[0]
        for whole, start, answer in zip(both, before, answers, strict=True)
    ]


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: it would warn of texts beyond the model's context, which are cut afterwards
    return list(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids) if texts else []
