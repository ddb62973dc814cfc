"""Where rows of a user's own task come from: a JSON file or a data set on the Hugging Face hub, named by a `TaskSpec`.

`loading` turns the raw rows into prompts and answers. A hub data set stays the memory-mapped table `datasets` makes of
it; only rows that end up in a split are formatted.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]

FILES = (".jsonl", ".json", ".csv")  # endings of paths; a .csv file is refused with the way to convert it


@dataclass(frozen=True)
class TaskSpec:
    """One task of the user's own. A ValueError for a template that does not read."""

    name: str  # value of the `task` column
    source: str  # path of a `.jsonl` file or of a `.json` file with a list, or a hub id such as "stanfordnlp/sst2"
    prompt: str = "{prompt}"  # template; best ends in a colon: the answer follows after one space
    answer: str = "{answer}"  # template, e.g. "{label}"; a hub column of class numbers gives the class names
    split: str = "train"  # of the hub data set that rows are taken from; without effect on a file
    test_split: str | None = None  # or the path of another file; None cuts test rows off the training rows
    subset: str | None = None  # configuration of the hub data set, e.g. "cola" of "nyu-mll/glue"
    words: Mapping[str, str] = field(default_factory=dict)  # replaces answers, {"0": "negative"}
    task_column: str | None = "task"  # column which, where the data has it, names the task instead of `name`

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # where it is a field of a pydantic model

    def __post_init__(self) -> None:
        placeholders(self.prompt, self.answer)

    @property
    def is_file(self) -> bool:
        """Whether `source` is a path, by its ending or because the file exists."""
        return self.source.endswith(FILES) or Path(self.source).is_file()


def read_rows(spec: TaskSpec, split: str) -> Rows:
    """Rows of one split that have the columns its templates need; a ValueError if not, or where nothing is there."""
    rows: Rows = read_json(Path(spec.source)) if spec.is_file else _read_hub(spec.source, spec.subset, split)
    if not len(rows):
        raise ValueError(f"{spec.source!r} has no rows; expected one JSON object per line, or a non-empty split")
    present = list(rows[0])
    missing = [name for name in placeholders(spec.prompt, spec.answer) if name not in present]
    if missing:
        raise ValueError(
            f"{spec.source!r} has no column {' and no column '.join(map(repr, missing))}; present:"
            f" {', '.join(present)}. "
            f"Name the columns in the task's prompt and answer, e.g. prompt: 'Text: {{{present[0]}}}\\nLabel:' and"
            f" answer: '{{{present[-1]}}}'"
        )
    return rows


def placeholders(*templates: str) -> list[str]:
    """Column names in templates, each once, in order. Raises ValueError for unbalanced braces or empty placeholders."""
    found: dict[str, None] = {}
    for template in templates:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise ValueError(f"template {template!r}: {error}; write {{{{ and }}}} for literal braces") from None
        if "" in names:
            raise ValueError(f"template {template!r} has an empty placeholder; name a column, e.g. {{text}}")
        # "{answers[text]}" and "{a.b}" reach into the columns "answers" and "a"
        found.update(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in names))
    return list(found)


class FileRows(list[dict[str, Any]]):
    """The objects of a file; `places` says where each stands."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []


def place(rows: Rows, source: str, number: int) -> str:
    """How messages call a row: its line or item in a file, else its number."""
    return rows.places[number] if isinstance(rows, FileRows) else f"row {number} of {source!r}"


def read_json(path: Path) -> FileRows:
    """All objects of a JSON Lines file, or of the list in a `.json` file; blank lines are skipped.

    Raises ValueError, naming the line or item, unless each is a JSON object with the first one's keys.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}; expected a .jsonl file with one JSON object per line (in a recipe, relative paths "
            f"start from the recipe's own folder)"
        )
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(
            f"{str(path)!r} is not a .jsonl or .json file; convert it, e.g. with "
            f"pandas.read_csv(path).to_json('data.jsonl', orient='records', lines=True)"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    rows = FileRows()
    for value, where in _items(text, path) if path.suffix == ".json" else _lines(text, path):
        if not isinstance(value, dict):
            shown = json.dumps(value)[:40]
            raise ValueError(f"{where}: expected a JSON object such as {{'prompt': ..., 'answer': ...}}, got {shown!r}")
        missing = [key for key in (rows[0] if rows else ()) if key not in value]
        if missing:
            raise ValueError(
                f"{where}: lacks {', '.join(missing)}, which the first one has; present: {', '.join(value)}"
            )
        rows.append(value)
        rows.places.append(where)
    return rows


def _items(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    found = _parse(text, str(path)) if text.strip() else []
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of JSON objects, got a single value of {type(found).__name__}")
    return ((item, f"{path}, item {number}") for number, item in enumerate(found, start=1))


def _lines(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines, which knows line ends within texts
        if line.strip():
            yield _parse(line, f"{path}, line {number}"), f"{path}, line {number}"


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        end = len(text.rstrip())  # what is missing is missed after the last word, not on the empty line below
        found = json.JSONDecodeError(error.msg, text, min(error.pos, end))
        line = f"line {found.lineno}, " if "\n" in text[:end] else ""
        raise ValueError(f"{where}: not valid JSON ({found.msg} at {line}column {found.colno})") from None


def _read_hub(source: str, subset: str | None, split: str) -> Rows:
    import datasets

    try:
        table = datasets.load_dataset(source, subset, split=split)
    except OSError as error:
        raise ConnectionError(
            f"could not load data set {source!r} from the Hugging Face hub. Check the id and the network "
            f"(HF_HUB_OFFLINE, HF_TOKEN for gated data), or give the path of a .jsonl file. Cause: {error}"
        ) from error
    classes = {name: kind.names for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}

    def named(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Class numbers as names; none and -1 (unlabelled) as None."""
        for column, names in classes.items():
            batch[column] = [None if number is None or number < 0 else names[number] for number in batch[column]]
        return batch

    return table.with_transform(named)
