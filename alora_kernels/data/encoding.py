"""From prompt and answer (of `loading`) to unpadded token ids with a loss on the answer alone, for the trainer.

The ids begin exactly as the tokenizer encodes the prompt alone, so that the model sees the same prompt when it
generates; the answer's ids, and eos where the tokenizer has one, come after. `Lost` counts what rows lose on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

#: label of a token that the loss skips, as in torch and transformers
IGNORE = -100


@dataclass
class Lost:
    """What rows lose on their way from a source to token ids, by task, or by source where it is a whole one's."""

    repeated: Counter[str] = field(default_factory=Counter)  # rows left out: their task has the same prompt already
    contradicting: Counter[str] = field(default_factory=Counter)  # those of them with another answer
    held: Counter[str] = field(default_factory=Counter)  # training rows left out: they judge, from a file of their own
    limited: dict[str, tuple[int, int]] = field(default_factory=dict)  # training rows taken, of how many (`train_size`)
    capped: dict[str, tuple[int, int]] = field(default_factory=dict)  # test rows taken, of how many asked for (half)
    judged: dict[str, tuple[int, int]] = field(default_factory=dict)  # rows taken of files that judge, of how many
    moved: Counter[str] = field(default_factory=Counter)  # test rows that train, since their task has no others
    untrained: Counter[str] = field(default_factory=Counter)  # test rows left out: their task has no training row
    cut: Counter[str] = field(default_factory=Counter)  # rows whose prompt lost its middle
    encoded: Counter[str] = field(default_factory=Counter)  # rows turned into token ids
    max_length: int = 0  # tokens that the cut rows were cut to

    def lines(self) -> list[str]:
        """One line for each kind of loss that occurred."""
        other = f" (with another answer: {_by(self.contradicting)})" if self.contradicting else ""
        cut = {task: (count, self.encoded[task]) for task, count in self.cut.items()}
        said = {
            f"repeated prompts left out: {_by(self.repeated)}{other}": self.repeated,
            f"training rows left out, they stand among the rows that judge: {_by(self.held)}": self.held,
            f"training rows taken (train_size): {_of(self.limited)}": self.limited,
            f"test rows taken, at most half of all: {_of(self.capped, 'asked for')}": self.capped,
            f"rows taken of files and splits that judge (test_size, validation_size): {_of(self.judged)}": self.judged,
            f"test rows trained on, their task has no others: {_by(self.moved)}": self.moved,
            f"test rows of tasks without training rows left out: {_by(self.untrained)}": self.untrained,
            f"prompts cut in the middle to fit max_length={self.max_length}: {_of(cut)}": cut,
        }
        return [line for line, counts in said.items() if counts]


def _by(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _of(counts: Mapping[str, tuple[int, int]], what: str = "") -> str:
    return ", ".join(f"{name} {count} of {total} {what}".rstrip() for name, (count, total) in counts.items())


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 96, *, lost: Lost | None = None
) -> Dataset:
    """Tokenise `prompt + " " + answer + eos`; labels are -100 except on answer and eos.

    A row that is too long loses the middle of its prompt: its first words say what is asked, its last ones are the cue
    for the answer, which is never cut. `lost` counts such rows.

    Args:
        dataset: string columns `prompt`, `answer` and `task`, or a ValueError; a TypeError for a `DatasetDict`.
        max_length: most tokens of a row; a ValueError if an answer and its eos leave no room for a prompt token.

    Returns:
        A data set with `input_ids`, `attention_mask`, `labels` (each `[length]`, integers) and `task`.
    """
    from datasets import Dataset, Features, List, Value

    if not isinstance(dataset, Dataset):
        raise TypeError(f"expected one split, got {type(dataset).__name__}; call encode(splits['train'], tokenizer)")
    missing = [column for column in ("prompt", "answer", "task") if column not in dataset.column_names]
    if missing:
        raise ValueError(f"data set lacks column {', '.join(missing)}; present: {', '.join(dataset.column_names)}")

    lost = Lost() if lost is None else lost
    lost.max_length = max_length
    prompts, answers = list(dataset["prompt"]), list(dataset["answer"])
    before = _ids(prompts, tokenizer)
    ends = _answer_ids(prompts, answers, before, tokenizer)
    bos = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for prompt, end, answer, task in zip(before, ends, answers, dataset["task"], strict=True):
        end = end + eos
        room = max_length - len(bos) - len(end)
        if room < 1:
            raise ValueError(f"answer {answer[:40]!r} takes {len(end)} tokens with eos; raise max_length={max_length}")
        lost.encoded[task] += 1
        if len(prompt) > room:
            lost.cut[task] += 1
            head = room // 4
            prompt = prompt[:head] + prompt[len(prompt) - (room - head) :]
        start = bos + prompt
        mask, labels = [1] * (len(start) + len(end)), [IGNORE] * len(start) + end
        rows.append({"input_ids": start + end, "attention_mask": mask, "labels": labels, "task": task})
    columns = dict.fromkeys(("input_ids", "attention_mask", "labels"), List(Value("int64")))
    features = Features({**columns, "task": Value("string")})
    return Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features=features)


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
