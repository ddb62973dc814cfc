"""From a task's name to train, validation and test splits of prompts and answers, which `encoding` takes.

All sources go one way: shuffle the row numbers, format rows in that order, skip prompts their task had before, take the
test rows first, the validation rows next and the train rows last. So the splits of a task share no prompt, and the test
rows do not change with `train_size`. The same prompt under two tasks counts twice: only the task tells such rows apart.

`stream` reads the same sources while training, each as an endless stream of token ids, mixed by weights.
"""

from __future__ import annotations

import difflib
import json
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import did_you_mean, printable
from .encoding import SHOWN, Lost, encode_batch, features_of_ids
from .forms import ALPACA, Example, Form, answers_of, form_of, is_alpaca, to_example
from .sources import FILES, HELD, FileRows, Rows, TaskSpec, raw_rows, read_rows
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset

    from ..adapters.cards import TaskCard

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HEAD = 1000  # rows of a stream that are read before training, besides those that judge
CHUNK = 100  # rows of a stream that are read at a time
BUFFER = 1000  # rows of a task's stream among which the next one is drawn
Parts = dict[str, list[Example]]  # by split
Seen = dict[tuple[str, str], tuple[str, bool]]  # task and question -> answer, and whether a held row of its own file


def load_task(
    name_or_spec: str | Task | TaskSpec,
    *,
    seed: int = 0,
    train_size: int | None = None,
    test_size: float = 200,
    validation_size: float = 0,
    lost: Lost | None = None,
) -> DatasetDict:
    """Splits of one task with string columns `prompt`, `answer`, `task` and `messages`; they share no prompt.

    They are "train", "test" and, where there are rows for it, "validation". `messages` is a chat's turns as JSON, "" of
    any other row.

    Args:
        name_or_spec: a key of `TASKS`, the path of a .jsonl, .json, .csv or .parquet file or a hub id with a known form
            of rows (`prompt` and `answer`; `messages`; `conversations`; `instruction` and `output`), or a `TaskSpec`
            that names other columns.
        seed: decides which rows go where and in what order; the same seed gives the same splits.
        train_size: at most so many train rows; None takes all that are left.
        test_size: at most so many test rows, and at most half of all rows where the spec names no `test_split` and
            there is something to train; below 1 a share of them. A share that the spec gives takes its place.
        validation_size: the same of rows that judge while training; 0 takes none, or all of a split of their own.
        lost: counts what is left out.

    Raises:
        MissingPackageError: the task's data package is not installed.
        FileNotFoundError, ConnectionError: the file or hub data set is not there.
        ValueError: unknown name, bad file, missing column, empty answer, or no row to train on.
    """
    sizes = Sizes(train_size, {"test": test_size, "validation": validation_size})
    return _to_splits(_split([as_source(name_or_spec)], seed, sizes, lost or Lost()))


def load_tasks(
    names: Sequence[str | Task | TaskSpec],
    *,
    seed: int = 0,
    train_size: int | None = None,
    test_size: float = 200,
    validation_size: float = 0,
    lost: Lost | None = None,
    streaming: bool = False,
) -> DatasetDict:
    """Several different tasks mixed: each as `load_task` gives it, sizes per source, rows shuffled by the seed.

    `streaming` reads the head of each source alone: the rows that judge, and some to know the tasks and their answers
    by. `stream` reads all the others while training.
    """
    sources = [as_source(name) for name in names]
    called = [source.name for source in sources]
    if not called or len(set(called)) < len(called):
        raise ValueError(f"expected one or more different tasks, got {called}")
    sizes = Sizes(train_size, {"test": test_size, "validation": validation_size}, streaming)
    parts, mix = _split(sources, seed, sizes, lost or Lost()), random.Random(seed)
    for split in ("train", *HELD):
        mix.shuffle(parts[split])
    return _to_splits(parts)


@dataclass(frozen=True)
class Sizes:
    """Rows asked for, of each source."""

    train: int | None
    held: Mapping[str, float]  # by split that judges; below 1 a share of the source's rows
    streaming: bool = False

    def __post_init__(self) -> None:
        if min(self.train or 0, *self.held.values()) < 0:
            said = ", ".join(f"{split}_size={count}" for split, count in {"train": self.train, **self.held}.items())
            raise ValueError(f"sizes must not be negative, got {said}")

    def of(self, spec: TaskSpec, split: str, total: int) -> int:
        """Rows of a source for a split that judges: the source's own share of its `total` rows before all else."""
        own = getattr(spec, f"{split}_split")
        size = own if isinstance(own, float) else self.held[split]
        if self.streaming and 0 < size < 1:
            raise ValueError(
                f"task {spec.name!r}: a stream's length is not known, nor a share of it ({split}: {size}): give a"
                f" number of rows ({split}_size), or another split"
            )
        return max(1, round(size * total)) if 0 < size < 1 else int(size)


def as_source(source: str | Task | TaskSpec) -> Task | TaskSpec:
    """What a name means: a built-in task, a file or folder, or a hub id. Raises ValueError if none of them."""
    if not isinstance(source, str):
        return source
    if source in TASKS:
        return TASKS[source]
    path = Path(source)
    if source.endswith(FILES) or path.is_absolute():
        return TaskSpec(name=path.stem if source.endswith(FILES) else path.name, source=source)
    spec = TaskSpec(name=source, source=source)
    if spec.is_file or _HUB_ID.fullmatch(source):
        return spec
    close = difflib.get_close_matches(source, TASKS, n=1)
    raise ValueError(
        f"unknown task {source!r}{f', did you mean {close[0]}?' if close else ''}; built-in tasks: {', '.join(TASKS)}. "
        f"The path of a .jsonl file, a hub id (owner/name) or a TaskSpec works as well"
    )


def _split(sources: Sequence[Task | TaskSpec], seed: int, sizes: Sizes, lost: Lost) -> Parts:
    seen: Seen = {}
    parts = [_split_source(source, seed, sizes, seen, lost) for source in sources]
    for spec in map(spec_of, sources):
        _check_words(spec, lost, whole=not sizes.streaming)
    whole = {split: [example for part in parts for example in part[split]] for split in ("train", *HELD)}
    judged = {(one.task, one.question) for split in HELD for one in whole[split] if one.messages}
    chats = (one for one in whole["train"] if one.messages)  # an earlier turn may be the last one of a chat that judges
    taught = {one for one in chats if not judged.isdisjoint((one.task, question) for question in one.questions())}
    lost.held.update(one.task for one in taught)
    whole["train"] = [one for one in whole["train"] if one not in taught]
    if sizes.train != 0:
        trained = {example.task for example in whole["train"]}
        for split in HELD:
            lost.untrained.update(example.task for example in whole[split] if example.task not in trained)
            whole[split] = [example for example in whole[split] if example.task in trained]
    return whole


def _split_source(source: Task | TaskSpec, seed: int, sizes: Sizes, seen: Seen, lost: Lost) -> Parts:
    """Examples of one source that are not in `seen` yet."""
    spec = spec_of(source)
    if isinstance(source, Task):
        rows: Rows = source.rows()
    elif sizes.streaming:
        rows = read_rows(spec, limit=HEAD + sum(sizes.of(spec, split, 0) for split in HELD))
    else:
        rows = read_rows(spec)
    form = form_of(spec, rows)
    examples = _shuffled(spec, form, rows, seed, seen, lost)
    parts: Parts = {"train": []}
    for split in HELD:
        if isinstance(own := getattr(spec, f"{split}_split"), str):
            parts[split] = _of_its_own(spec, form, split, own, sizes, seed, seen, lost)
    counts = {split: sizes.of(spec, split, len(rows)) for split in HELD if split not in parts}
    for split, count in counts.items():
        parts[split] = list(islice(examples, count))
    if sizes.train == 0:
        return parts
    # looks so far ahead that the test rows do not change with train_size
    ahead = None if sizes.train is None else max(sizes.train, *counts.values(), 0)
    rest = list(islice(examples, ahead))
    if counts and (ahead is None or len(rest) < ahead):  # all rows are known
        rest = _enough_to_train(spec.name, parts, counts, rest, lost)
    if not rest:
        raise ValueError(
            f"task {spec.name!r}: every prompt of {', '.join(spec.files)!r} is a test prompt, none is left to train on"
        )
    held = sum(len(parts[split]) for split in counts)
    if not sizes.streaming and sizes.train is not None and sizes.train <= len(rest) and sizes.train + held < len(rows):
        lost.limited[spec.name] = sizes.train, len(rows)
    return parts | {"train": rest[: sizes.train]}


def _check_words(spec: TaskSpec, lost: Lost, whole: bool) -> None:
    """Count the answers that `words` does not name; a ValueError for a name that none of the `whole` rows has instead.

    A name without rows is no mistake where every answer has one: a class may be absent.
    """
    answers = lost.answers.get(spec.name, Counter())
    left = Counter({a: n for a, n in answers.items() if a not in spec.words and a not in spec.words.values()})
    unused = [name for name in spec.words if name not in answers] if whole else []
    if unused and left:
        known = [printable(answer, 40) for answer, _ in left.most_common(SHOWN)]
        raise ValueError(
            f"task {spec.name!r}: words: no row answers {unused[0]!r}; {did_you_mean(unused[0], known)}. Name"
            " answers as they stand in the data, or leave the entry out"
        )
    lost.unnamed.update({f"{spec.name} {printable(answer, 40)!r}": count for answer, count in left.items()})
    lost.unused += [f"{spec.name} {name!r}" for name in unused]


def spec_of(source: Task | TaskSpec) -> TaskSpec:
    """A built-in task as if it were one of the user's own."""
    if isinstance(source, TaskSpec):
        return source
    return TaskSpec(source.name, source.path, prompt=source.template, answer="{label}", task_column=None)


def _of_its_own(
    spec: TaskSpec, form: Form, split: str, own: str, sizes: Sizes, seed: int, seen: Seen, lost: Lost
) -> list[Example]:
    """Rows that judge and have a file or hub split of their own."""
    size = sizes.held[split]
    most = None if 0 < size < 1 or (split == "validation" and not size) else int(size)
    rows = read_rows(spec, own, most if sizes.streaming else None)
    spec = TaskSpec(spec.name, own, spec.prompt, spec.answer, words=spec.words, task_column=spec.task_column,
                    system=spec.system)  # fmt: skip
    if (other := form_of(spec, rows)).name != form.name:
        raise ValueError(f"{own!r}: its rows are {other.name}, those to train on {form.name}: one task has one form")
    examples = list(islice(_shuffled(spec, other, rows, seed, seen, lost, held=True), most))
    if most is not None and len(examples) == most < len(rows):
        lost.judged[f"{spec.name} ({split})"] = most, len(rows)
    return examples


def _enough_to_train(
    name: str, parts: Parts, counts: Mapping[str, int], rest: list[Example], lost: Lost
) -> list[Example]:
    """Training examples such that half of all train, and half of a task that the held rows have whole.

    The held rows, in `parts`, shrink accordingly.
    """
    rest = [example for split in counts for example in parts[split]] + rest
    for split, count in counts.items():  # test rows first
        taken = min(count, len(rest) // 2)
        if taken < count:
            lost.capped[name if split == "test" else f"{name} ({split})"] = taken, count
        parts[split], rest = rest[:taken], rest[taken:]
    trained = {example.task for example in rest}
    untrained: dict[str, list[Example]] = {}
    for split in counts:
        for example in parts[split]:
            if example.task not in trained:
                untrained.setdefault(example.task, []).append(example)
    chosen = {example for own in untrained.values() for example in own[len(own) // 2 :]}
    lost.moved.update(example.task for example in chosen)
    moved = [example for split in counts for example in parts[split] if example in chosen]
    for split in counts:
        parts[split] = [example for example in parts[split] if example not in chosen]
    return moved + rest


def _shuffled(
    spec: TaskSpec, form: Form, rows: Rows, seed: int, seen: Seen, lost: Lost, held: bool = False
) -> Iterator[Example]:
    """Rows in the seed's order as examples; prompts that their task has in `seen` are skipped, new ones added.

    `held` rows judge and are not cut off the training rows.
    """
    if spec.words:
        lost.answers.setdefault(spec.name, Counter()).update(answers_of(form, rows))
    order = list(range(len(rows)))
    # the name in the seed: tasks of equal length must not be shuffled alike
    random.Random(f"{seed} {spec.name}").shuffle(order)
    for number in order:
        example = to_example(spec, form, rows, number)
        same = example.task, example.question
        if same not in seen:
            seen[same] = example.answer, held
            yield example
            continue
        answer, kept = seen[same]
        (lost.held if kept and not held else lost.repeated)[example.task] += 1
        if answer != example.answer:
            lost.contradicting[example.task] += 1


def _to_splits(parts: Parts) -> DatasetDict:
    from datasets import Dataset, DatasetDict

    features = _features()

    def split(examples: list[Example]) -> Dataset:
        return Dataset.from_dict({c: [row[i] for row in examples] for i, c in enumerate(features)}, features=features)

    return DatasetDict({name: split(parts[name]) for name in ("train", *HELD) if parts[name] or name != "validation"})


def _features() -> Features:
    from datasets import Features, Value

    return Features(dict.fromkeys(Example._fields, Value("string")))


def stream(
    sources: Sequence[str | Task | TaskSpec],
    text: DatasetDict,
    tokenizer: Any,
    max_length: int | None = None,
    *,
    seed: int = 0,
    train_size: int | None = None,
    weights: Mapping[str, float] | None = None,
    lost: Lost | None = None,
    chat_template: str | None = None,
) -> IterableDataset:
    """Rows of all sources as `encode` gives them, without end; those of `text` that judge are left out.

    Args:
        sources: as for `load_tasks`, which gave `text`.
        seed: of the order, in which a row moves among its thousand neighbours, and of the mixture.
        train_size: at most so many rows of each source, over and over; None takes all.
        weights: source's name -> how often its rows come, relative to the others; 1 unless given.
        lost: counts, while rows are read, what they lose.
        tokenizer, max_length, chat_template: as of `encode`.
    """
    from datasets import IterableDataset, interleave_datasets

    lost, known = lost or Lost(), [as_source(source) for source in sources]
    judge = [Example(**row) for split in HELD if split in text for row in text[split]]
    held = frozenset((example.task, example.question) for example in judge)
    features = _features()
    parts = []
    for source in known:
        rows = IterableDataset.from_generator(_examples, features, {"source": source, "held": held})
        rows = rows if train_size is None else rows.take(train_size)
        parts.append(rows.shuffle(seed=seed, buffer_size=BUFFER).repeat(None))
    names = [source.name for source in known]
    if strangers := [name for name in weights or () if name not in names]:
        raise ValueError(
            f"weights: {', '.join(strangers)}: a stream is weighed by entries of tasks, {', '.join(names)}"
        )
    shares = [(weights or {}).get(name, 1.0) for name in names]
    mixed = interleave_datasets(parts, [share / sum(shares) for share in shares], seed=seed) if parts[1:] else parts[0]

    def ids(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = encode_batch(rows, tokenizer, max_length, lost, chat_template)
        return {column: found[column] for column in features_of_ids()}

    return mixed.map(ids, batched=True, batch_size=CHUNK, remove_columns=[*features], features=features_of_ids())


def _examples(source: Task | TaskSpec, held: frozenset[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """All rows of a source that do not judge, in its order."""
    spec = spec_of(source)
    own = enumerate(source.rows()) if isinstance(source, Task) else ()
    found = ((row, f"row {number} of {spec.name}") for number, row in own) if own else raw_rows(spec)
    first = chunk = list(islice(found, 1))
    while chunk:
        rows = FileRows(first + chunk)  # all rows must have the form of the first one
        form = form_of(spec, rows)
        for number in range(1, len(rows)):
            example = to_example(spec, form, rows, number)
            if held.isdisjoint((example.task, question) for question in example.questions()):
                yield example._asdict()
        chunk = list(islice(found, CHUNK))


def majority_baseline(dataset: DatasetDict) -> dict[str, float]:
    """Accuracy, per task, of always giving the task's most frequent train answer on its test rows: what knows nothing.

    Of equally frequent answers the alphabetically first counts. A ValueError for a task that has test rows alone.
    """
    train, test = by_task(dataset["train"], "answer"), by_task(dataset["test"], "answer")
    untrained = [task for task in test if task not in train]
    if untrained:
        raise ValueError(f"no train rows for {', '.join(untrained)}; tasks with train rows: {', '.join(train)}")
    majority = {task: statistics.mode(sorted(answers)) for task, answers in train.items()}
    return {task: test[task].count(majority[task]) / len(test[task]) for task in sorted(test)}


def by_task(rows: Dataset, column: str) -> dict[str, list[str]]:
    """A column's values by the task of their rows, as both come."""
    found: dict[str, list[str]] = {}
    for task, value in zip(rows["task"], rows[column], strict=True):
        found.setdefault(task, []).append(value)
    return found


def task_cards(
    sources: Sequence[str | Task | TaskSpec],
    text: DatasetDict,
    words: Mapping[str, Sequence[str]],
    chat_template: str | None = None,
) -> dict[str, TaskCard]:
    """How the tasks of a training run were asked, for whoever gets the adapter; sources and text are `load_tasks`'s.

    A sample comes from built-in tasks alone, whose rows are public: the user's own data must not leave with an adapter.
    `words` has the label words of tasks that do not answer in texts. A task that a file's column names has the file's
    template; if several files could have named it and their templates differ, it is asked with whole prompts. A chat
    task's system prompt is one that all of its chats begin with, or its entry's; `chat_template` the recipe's own.
    """
    from ..adapters.cards import TaskCard

    known = {source.name: source for source in map(as_source, sources)}
    naming = {spec.prompt for spec in known.values() if isinstance(spec, TaskSpec) and spec.task_column}
    common = naming.pop() if len(naming) == 1 else TaskSpec.prompt
    messages, asked = by_task(text["train"], "messages"), by_task(text["test"], "prompt")
    cards = {}
    for task, prompts in sorted(by_task(text["train"], "prompt").items()):
        source, sample, answers = known.get(task), None, tuple(words.get(task, ()))
        if chats := [json.loads(turns) for turns in messages[task] if turns]:
            first = {turns[0]["content"] if turns[0]["role"] == "system" else None for turns in chats}
            system = first.pop() if len(first) == 1 else getattr(source, "system", None)
            cards[task] = TaskCard(answers=answers, chat=True, chat_template=chat_template, system=system)
            continue
        template = source.prompt if isinstance(source, TaskSpec) else common
        if isinstance(source, Task):
            template = source.template
            sample = asked[task][0] if task in asked else None
        elif all(map(is_alpaca, prompts)):
            template = ALPACA.prompt
        cards[task] = TaskCard(template.rstrip() if template else None, answers, sample)
    return cards
