"""From a task's name to train and test splits of prompt, answer and task, which `encoding` takes.

All sources go one way: shuffle the row numbers, format rows in that order, skip prompts their task had before, take the
test rows first and the train rows next. So test and train of a task share no prompt, and the test rows do not change
with `train_size`. The same prompt under two tasks counts twice: only the task tells such rows apart.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from .encoding import Lost
from .sources import FILES, Rows, TaskSpec, place, read_rows
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..adapters.cards import TaskCard

#: prompt, answer, task
Example = tuple[str, str, str]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_task(
    name_or_spec: str | Task | TaskSpec,
    *,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int = 200,
    lost: Lost | None = None,
) -> DatasetDict:
    """Train and test split of one task, with string columns `prompt`, `answer`, `task`; they share no prompt.

    Args:
        name_or_spec: a key of `TASKS`, the path of a `.jsonl` or `.json` file with `prompt` and `answer` (and perhaps
            `task`), a hub id whose data set has those columns, or a `TaskSpec` that names other columns.
        seed: decides which rows go where and in what order; the same seed gives the same splits.
        train_size: at most so many train rows; None takes all that are left.
        test_size: at most so many test rows, and at most half of all rows where the spec names no `test_split` and
            there is something to train.
        lost: counts what is left out.

    Raises:
        MissingPackageError: the task's data package is not installed.
        FileNotFoundError, ConnectionError: the file or hub data set is not there.
        ValueError: unknown name, bad file, missing column, empty answer, or no row to train on.
    """
    return _to_splits(*_split([as_source(name_or_spec)], seed, train_size, test_size, lost or Lost()))


def load_tasks(
    names: Sequence[str | Task | TaskSpec],
    *,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int = 200,
    lost: Lost | None = None,
) -> DatasetDict:
    """Several different tasks mixed: each as `load_task` gives it, sizes per source, rows shuffled by the seed."""
    sources = [as_source(name) for name in names]
    called = [source.name for source in sources]
    if not called or len(set(called)) < len(called):
        raise ValueError(f"expected one or more different tasks, got {called}")
    train, test = _split(sources, seed, train_size, test_size, lost or Lost())
    mix = random.Random(seed)
    mix.shuffle(train)
    mix.shuffle(test)
    return _to_splits(train, test)


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


def _split(
    sources: Sequence[Task | TaskSpec], seed: int, train_size: int | None, test_size: int, lost: Lost
) -> tuple[list[Example], list[Example]]:
    if test_size < 0 or (train_size is not None and train_size < 0):
        raise ValueError(f"sizes must not be negative, got train_size={train_size}, test_size={test_size}")
    seen: dict[tuple[str, str], str] = {}
    parts = [_split_source(source, seed, train_size, test_size, seen, lost) for source in sources]
    train, test = ([example for part in parts for example in part[i]] for i in (0, 1))
    if train_size != 0:
        trained = {task for _, _, task in train}
        lost.untrained.update(task for _, _, task in test if task not in trained)
        test = [example for example in test if example[2] in trained]
    return train, test


def _split_source(
    source: Task | TaskSpec,
    seed: int,
    train_size: int | None,
    test_size: int,
    seen: dict[tuple[str, str], str],
    lost: Lost,
) -> tuple[list[Example], list[Example]]:
    """Train and test examples of one source that are not in `seen` yet, (task, prompt) -> answer."""
    if isinstance(source, Task):
        spec = TaskSpec(source.name, source.path, prompt=source.template, answer="{label}", task_column=None)
        rows: Rows = source.rows()
    else:
        spec = source
        rows = read_rows(spec, spec.split)

    examples = _shuffled(spec, rows, seed, seen, lost)
    if spec.test_split is None:
        test = list(islice(examples, test_size))
    else:
        kept = dataclasses.replace(spec, source=spec.test_split) if spec.is_file else spec
        test = list(islice(_shuffled(kept, read_rows(kept, spec.test_split), seed, seen, lost), test_size))
    if train_size == 0:
        return [], test
    # looks so far ahead that the test rows do not change with train_size
    rest = list(islice(examples, None if train_size is None else max(train_size, test_size)))
    if spec.test_split is None and (train_size is None or len(rest) < max(train_size, test_size)):  # all rows are known
        test, rest = _enough_to_train(spec.name, test, rest, test_size, lost)
    if not rest:
        raise ValueError(
            f"task {spec.name!r}: every prompt of {spec.source!r} is a test prompt, none is left to train on"
        )
    own_test = len(test) if spec.test_split is None else 0
    if train_size is not None and train_size <= len(rest) and train_size + own_test < len(rows):
        lost.limited[spec.name] = train_size, len(rows)
    return rest[:train_size], test


def _enough_to_train(
    name: str, test: list[Example], rest: list[Example], test_size: int, lost: Lost
) -> tuple[list[Example], list[Example]]:
    """Test and training examples such that half of all train, and half of a task that the test rows hold whole."""
    if len(rest) < len(test):
        half = (len(test) + len(rest)) // 2
        lost.capped[name] = half, test_size
        test, rest = test[:half], test[half:] + rest
    trained = {task for _, _, task in rest}
    places: dict[str, list[int]] = {}
    for at, (_, _, task) in enumerate(test):
        if task not in trained:
            places.setdefault(task, []).append(at)
    moved = {at for own in places.values() for at in own[len(own) // 2 :]}
    lost.moved.update(test[at][2] for at in moved)
    return [e for at, e in enumerate(test) if at not in moved], [test[at] for at in sorted(moved)] + rest


def _shuffled(spec: TaskSpec, rows: Rows, seed: int, seen: dict[tuple[str, str], str], lost: Lost) -> Iterator[Example]:
    """Rows in the seed's order as examples; prompts that their task has in `seen` are skipped, new ones added."""
    order = list(range(len(rows)))
    # the name in the seed: tasks of equal length must not be shuffled alike
    random.Random(f"{seed} {spec.name}").shuffle(order)
    for number in order:
        prompt, answer, task = _to_example(spec, rows, number)
        same = task, " ".join(prompt.casefold().split())
        if same not in seen:
            seen[same] = answer
            yield prompt, answer, task
        else:
            lost.repeated[task] += 1
            if seen[same] != answer:
                lost.contradicting[task] += 1


def _to_example(spec: TaskSpec, rows: Rows, number: int) -> Example:
    row = {column: "" if value is None else value for column, value in rows[number].items()}
    try:
        prompt = spec.prompt.format_map(row).rstrip()
        answer = spec.answer.format_map(row).strip()
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place(rows, spec.source, number)} does not fit the templates {spec.prompt!r}, {spec.answer!r}: {error!r}"
        ) from None
    answer = spec.words.get(answer, answer)
    if not prompt or not answer:
        raise ValueError(
            f"{place(rows, spec.source, number)} has an empty {'answer' if prompt else 'prompt'} (templates "
            f"{spec.prompt!r}, {spec.answer!r}); drop such rows, or choose a labelled split"
        )
    task = row.get(spec.task_column) if spec.task_column else None
    return prompt, answer, str(task or spec.name)


def _to_splits(train: list[Example], test: list[Example]) -> DatasetDict:
    from datasets import Dataset, DatasetDict, Features, Value

    features = Features(dict.fromkeys(("prompt", "answer", "task"), Value("string")))

    def split(examples: list[Example]) -> Dataset:
        return Dataset.from_dict({c: [row[i] for row in examples] for i, c in enumerate(features)}, features=features)

    return DatasetDict(train=split(train), test=split(test))


def majority_baseline(dataset: DatasetDict) -> dict[str, float]:
    """Accuracy, per task, of always giving the task's most frequent train answer on its test rows: what knows nothing.

    Of equally frequent answers the alphabetically first counts. A ValueError for a task that has test rows alone.
    """
    train, test = _answers(dataset["train"]), _answers(dataset["test"])
    untrained = [task for task in test if task not in train]
    if untrained:
        raise ValueError(f"no train rows for {', '.join(untrained)}; tasks with train rows: {', '.join(train)}")
    majority = {task: max(sorted(counts), key=counts.__getitem__) for task, counts in train.items()}
    return {task: test[task][majority[task]] / test[task].total() for task in sorted(test)}


def _answers(rows: Dataset) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for task, answer in zip(rows["task"], rows["answer"], strict=True):
        counts.setdefault(task, Counter())[answer] += 1
    return counts


def task_cards(
    sources: Sequence[str | Task | TaskSpec], text: DatasetDict, words: Mapping[str, Sequence[str]]
) -> dict[str, TaskCard]:
    """How the tasks of a training run were asked, for whoever gets the adapter; sources and text are `load_tasks`'s.

    A sample comes from built-in tasks alone, whose rows are public: the user's own data must not leave with an adapter.
    `words` has the label words of tasks that do not answer in texts. A task that a file's column names has the file's
    template; if several files could have named it and their templates differ, none.
    """
    from ..adapters.cards import TaskCard

    known = {source.name: source for source in map(as_source, sources)}
    naming = {spec.prompt for spec in known.values() if isinstance(spec, TaskSpec) and spec.task_column}
    common = naming.pop() if len(naming) == 1 else None
    cards = {}
    for task in sorted(set(text["train"]["task"])):
        source, sample = known.get(task), None
        template = source.prompt if isinstance(source, TaskSpec) else common
        if isinstance(source, Task):
            template = source.template
            sample = next((row["prompt"] for row in text["test"] if row["task"] == task), None)
        cards[task] = TaskCard(template.rstrip() if template else None, tuple(words.get(task, ())), sample)
    return cards
