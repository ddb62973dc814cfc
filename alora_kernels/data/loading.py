"""From a task's name to train and test splits of prompt, answer and task.

In:   names of built-in tasks, paths of JSON files, hub ids, or `TaskSpec`s; a seed and sizes.
Out:  a `datasets.DatasetDict` with splits `train` and `test` and string columns `prompt`, `answer`, `task`.
Who:  the CLI, examples, benchmarks and tests; `encoding` takes what comes out.

All sources go one way: shuffle the row numbers, format rows in that order, skip prompts seen before, take the test rows
first and the train rows next. So test and train share no prompt, and the test rows do not change with
`train_size`.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from alora_kernels.data.sources import FILES, Rows, TaskSpec, read_rows
from alora_kernels.data.tasks import TASKS, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

#: prompt, answer, task
Example = tuple[str, str, str]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_task(
    name_or_spec: str | Task | TaskSpec, *, seed: int = 0, train_size: int | None = None, test_size: int = 200
) -> DatasetDict:
    """Train and test split of one task.

    Args:
        name_or_spec: a key of `TASKS`, the path of a `.jsonl` or `.json` file with `prompt` and `answer` (and perhaps
            `task`), a hub id whose data set has those columns, or a `TaskSpec` that names other columns.
        seed: decides which rows go where and in what order; the same seed gives the same splits.
        train_size: at most so many train rows; None takes all that are left.
        test_size: number of test rows; at most so many where the spec names a `test_split`.

    Returns:
        Splits `train` and `test` with string columns `prompt`, `answer`, `task`. The answer follows the prompt after
        one space.

    Raises:
        MissingPackageError: the task's data package is not installed.
        FileNotFoundError, ConnectionError: the file or hub data set is not there.
        ValueError: unknown name, bad file, missing column, empty answer, or too few rows.
    """
    return _to_splits(*_split(as_source(name_or_spec), seed, train_size, test_size))


def load_tasks(
    names: Sequence[str | Task | TaskSpec], *, seed: int = 0, train_size: int | None = None, test_size: int = 200
) -> DatasetDict:
    """Several tasks mixed: each as `load_task` gives it, rows shuffled together by the seed.

    Args:
        names: as in `load_task`, each task once.
        seed: as in `load_task`.
        train_size: per task.
        test_size: per task.

    Raises:
        ValueError: no task, or a task given twice; else as in `load_task`.
    """
    sources = [as_source(name) for name in names]
    called = [source.name for source in sources]
    if not called or len(set(called)) < len(called):
        raise ValueError(f"expected one or more different tasks, got {called}")
    train: list[Example] = []
    test: list[Example] = []
    for source in sources:
        own_train, own_test = _split(source, seed, train_size, test_size)
        train += own_train
        test += own_test
    mix = random.Random(seed)
    mix.shuffle(train)
    mix.shuffle(test)
    return _to_splits(train, test)


def as_source(source: str | Task | TaskSpec) -> Task | TaskSpec:
    """What a name means: a built-in task, a file or folder, or a hub id.

    Raises:
        ValueError: none of them; the message lists the built-in tasks and the closest.
    """
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
    source: Task | TaskSpec, seed: int, train_size: int | None, test_size: int
) -> tuple[list[Example], list[Example]]:
    """Train and test examples of one source."""
    if test_size < 0 or (train_size is not None and train_size < 0):
        raise ValueError(f"sizes must not be negative, got train_size={train_size}, test_size={test_size}")
    if isinstance(source, Task):
        spec = TaskSpec(source.name, source.path, prompt=source.template, answer="{label}", task_column=None)
        rows: Rows = source.rows()
    else:
        spec = source
        rows = read_rows(spec, spec.split)

    seen: set[str] = set()
    examples = _shuffled(spec, rows, seed, seen)
    if spec.test_split is None:
        test = list(islice(examples, test_size))
    else:
        kept = dataclasses.replace(spec, source=spec.test_split) if spec.is_file else spec
        test = list(islice(_shuffled(kept, read_rows(kept, spec.test_split), seed, seen), test_size))
    train = list(islice(examples, train_size))
    if train_size != 0 and not train:
        raise ValueError(
            f"task {spec.name!r} has {len(test)} different prompts, none is left to train on after "
            f"test_size={test_size}; pass a smaller test_size"
        )
    return train, test


def _shuffled(spec: TaskSpec, rows: Rows, seed: int, seen: set[str]) -> Iterator[Example]:
    """Rows in the seed's order as examples; prompts in `seen` are skipped, new ones added to it."""
    order = list(range(len(rows)))
    # the name in the seed: tasks of equal length must not be shuffled alike
    random.Random(f"{seed} {spec.name}").shuffle(order)
    for number in order:
        example = _to_example(spec, rows, number)
        same = " ".join(example[0].casefold().split())
        if same not in seen:
            seen.add(same)
            yield example


def _to_example(spec: TaskSpec, rows: Rows, number: int) -> Example:
    """Row `number` through the templates."""
    row = {column: "" if value is None else value for column, value in rows[number].items()}
    prompt = spec.prompt.format_map(row).rstrip()
    answer = spec.answer.format_map(row).strip()
    answer = spec.words.get(answer, answer)
    if not prompt or not answer:
        raise ValueError(
            f"row {number} of {spec.source!r} has an empty {'answer' if prompt else 'prompt'} (templates "
            f"{spec.prompt!r}, {spec.answer!r}); drop such rows, or choose a labelled split"
        )
    task = row.get(spec.task_column) if spec.task_column else None
    return prompt, answer, str(task or spec.name)


def _to_splits(train: list[Example], test: list[Example]) -> DatasetDict:
    from datasets import DatasetDict

    return DatasetDict(train=_to_dataset(train), test=_to_dataset(test))


def _to_dataset(examples: list[Example]) -> Dataset:
    from datasets import Dataset, Features, Value

    columns = ("prompt", "answer", "task")
    return Dataset.from_dict(
        {column: [example[i] for example in examples] for i, column in enumerate(columns)},
        features=Features({column: Value("string") for column in columns}),
    )
