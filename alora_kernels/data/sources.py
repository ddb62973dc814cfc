"""Where rows of a user's own task come from: files, or a data set on the Hugging Face hub, named by a `TaskSpec`.

`forms` says what the raw rows mean, `loading` splits them. A hub data set and a parquet file stay tables; only rows
that end up in a split are formatted.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

Rows = Sequence[Mapping[str, Any]]

FILES = (".jsonl", ".json", ".csv", ".parquet")  # endings of paths
HELD = ("test", "validation")  # what judges; each has a field TaskSpec.<name>_split

if TYPE_CHECKING:
    Source = str | tuple[str, ...]
    Split = str | float
else:
    try:  # for recipes, whose mistakes then name one form; a bare machine for kernels has no pydantic and no recipes
        from pydantic import Discriminator, Field, Tag

        Source = Annotated[
            Annotated[str, Tag("as text")] | Annotated[tuple[str, ...], Field(min_length=1), Tag("as list")],
            Discriminator(lambda value: "as list" if isinstance(value, list | tuple) else "as text"),
        ]
        Split = Annotated[
            Annotated[str, Tag("as text")] | Annotated[float, Tag("as share")],
            Discriminator(lambda value: "as share" if isinstance(value, int | float) else "as text"),
        ]
    except ImportError:
        Source, Split = str, str


@dataclass(frozen=True)
class TaskSpec:
    """One task of the user's own. A ValueError for templates that do not read, and shares that leave nothing."""

    name: str  # value of the `task` column
    source: Source  # path of a .jsonl, .json (a list), .csv or .parquet file, or several, or one hub id
    prompt: str = "{prompt}"  # template; best ends in a colon: the answer follows after one space
    answer: str = "{answer}"  # template, e.g. "{label}"; a hub column of class numbers gives the class names
    split: str = "train"  # of the hub data set that rows are taken from
    test_split: Split | None = None  # another split, a file, or a share of the rows; None: `test_size` of them
    subset: str | None = None  # configuration of the hub data set, e.g. "cola" of "nyu-mll/glue"
    words: Mapping[str, str] = field(default_factory=dict)  # replaces answers, {"0": "negative"}
    task_column: str | None = "task"  # column which, where the data has it, names the task instead of `name`
    validation_split: Split | None = None  # the same of the rows that judge while training
    revision: str | None = None  # branch, tag or commit of the hub data set
    system: str | None = None  # first turn of chats that bring no system turn
    # what a model is judged by; None: the choice of a label word, and the loss where answers are texts
    metric: Literal["choice", "exact", "rouge", "number", "loss"] | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # where it is a field of a pydantic model

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            if not placeholders(template := getattr(self, name)):
                raise ValueError(f"{name}: {template!r} names no column; write for example {name}: '{{{name}}}'")
        shares = [share for part in HELD if isinstance(share := getattr(self, f"{part}_split"), int | float)]
        if any(not 0 < share < 1 for share in shares) or sum(shares) >= 1:
            raise ValueError(
                f"test_split and validation_split as numbers are shares of the rows, such as 0.1, and leave some to"
                f" train on; got {', '.join(map(str, shares))}"
            )
        if not isinstance(self.source, str) and not self.is_file:
            raise ValueError("a list of sources has files alone: make each hub data set a task of its own")
        if self.is_file and (self.subset or self.revision or self.split != "train"):
            raise ValueError("split, subset and revision are a hub data set's: leave them out beside a file")

    @property
    def files(self) -> tuple[str, ...]:
        """The source as a tuple, whether or not it is files."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def is_file(self) -> bool:
        """Whether `source` is a path, or paths, by their endings or because the files exist."""
        return all(path.endswith(FILES) or Path(path).is_file() for path in self.files)

    def located(self, find: Callable[[str], str]) -> TaskSpec:
        """The same task with its paths as `find` gives them."""
        places: dict[str, Any] = {"source": tuple(map(find, self.files)) if len(self.files) > 1 else find(*self.files)}
        for part in HELD:
            split = getattr(self, f"{part}_split")
            if isinstance(split, str) and (self.is_file or split.endswith(FILES)):
                places[f"{part}_split"] = find(split)
        return dataclasses.replace(self, **places)


def read_rows(spec: TaskSpec, split: str | None = None, limit: int | None = None) -> Rows:
    """Raw rows to train on, or those of another split, the hub's name of it or a path; a ValueError if none.

    `limit` reads the first so many and no further. Otherwise a hub data set and a single parquet file stay tables.
    """
    own, paths = _places(spec, split)
    if limit is not None or (own and (len(paths) > 1 or not paths[0].endswith(".parquet"))):
        rows: Rows = FileRows(islice(raw_rows(spec, split), limit))
    else:
        rows = _with_class_names(_read_parquet(paths[0]) if own else _read_hub(spec, split))
    if not len(rows):
        raise ValueError(
            f"{', '.join(map(repr, paths))} has no rows; expected one JSON object per line, or a non-empty split"
        )
    return rows


def raw_rows(spec: TaskSpec, split: str | None = None) -> Iterator[tuple[Any, str]]:
    """The rows of `read_rows` one by one, as they are read, each with its place."""
    own, paths = _places(spec, split)
    if not own:
        yield from _from_table(_read_hub(spec, split, streaming=True), paths[0])
    for path in paths if own else ():
        if path.endswith(".parquet"):
            yield from _from_table(_read_parquet(path, streaming=True), path)
        else:
            yield from _from_file(Path(path))


def _places(spec: TaskSpec, split: str | None) -> tuple[bool, tuple[str, ...]]:
    """Whether rows come from files, and their paths, or the hub's name."""
    own = spec.is_file if split is None else spec.is_file or split.endswith(FILES)
    return own, (split,) if split is not None and own else spec.files


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
    """Objects as they were read; `places` says where each stands. A ValueError for what is no object."""

    def __init__(self, found: Iterable[tuple[Any, str]]) -> None:
        super().__init__()
        self.places: list[str] = []
        for value, where in found:
            if not isinstance(value, dict):
                shown = json.dumps(value)[:40]
                raise ValueError(
                    f"{where}: expected a JSON object such as {{'prompt': ..., 'answer': ...}}, got {shown!r}"
                )
            self.append(value)
            self.places.append(where)


def place(rows: Rows, source: str, number: int) -> str:
    """How messages call a row: its line or item in a file, else its number."""
    return rows.places[number] if isinstance(rows, FileRows) else f"row {number} of {source!r}"


def _from_file(path: Path) -> Iterator[tuple[Any, str]]:
    """What a text file holds, each with its place; a ValueError names the line that does not read."""
    _check_there(path)
    if path.suffix not in FILES:
        raise ValueError(
            f"{str(path)!r} is not a {', '.join(FILES[:-1])} or {FILES[-1]} file; convert it, e.g. with"
            f" pandas.read_excel(path).to_json('data.jsonl', orient='records', lines=True)"
        )
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from {".json": _items, ".csv": _records}.get(path.suffix, _lines)(file, path)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}; expected a {', '.join(FILES[:-1])} or {FILES[-1]} file (in a recipe, relative"
            f" paths start from the recipe's own folder)"
        )


def _read_parquet(path: str, streaming: bool = False) -> Any:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    _check_there(Path(path))
    try:
        if streaming:
            return datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        return datasets.Dataset(parquet.read_table(path))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} does not read as parquet ({str(error)[:200]})") from None


def _records(file: TextIO, path: Path) -> Iterator[tuple[Any, str]]:
    """Rows of a CSV file, all values texts."""
    reader, ended = csv.DictReader(file, strict=True), 1
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            raise ValueError(f"{path}, line 1: names of columns must differ, got {', '.join(names)}")
        for row in reader:
            ended = reader.line_num
            where = f"{path}, line {ended - sum(str(value).count(chr(10)) for value in row.values())}"
            count = sum(value is not None for name, value in row.items() if name is not None) + len(row.get(None, ()))
            if count != len(names):
                raise ValueError(
                    f"{where}: has {count} fields, and line 1 names {len(names)} columns; put a text that holds commas"
                    f' or line ends into "quotes"'
                )
            yield row, where
    except csv.Error as error:
        raise ValueError(f"{path}, line {ended + 1}: not valid CSV ({error}); are its quotes closed?") from None


def _items(file: TextIO, path: Path) -> Iterator[tuple[Any, str]]:
    text = file.read()
    found = _parse(text, str(path)) if text.strip() else []
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of JSON objects, got a single value of {type(found).__name__}")
    yield from ((item, f"{path}, item {number}") for number, item in enumerate(found, start=1))


def _lines(file: TextIO, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _parse(line.rstrip("\n"), f"{path}, line {number}"), f"{path}, line {number}"


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        end = len(text.rstrip())  # what is missing is missed after the last word, not on the empty line below
        found = json.JSONDecodeError(error.msg, text, min(error.pos, end))
        line = f"line {found.lineno}, " if "\n" in text[:end] else ""
        raise ValueError(f"{where}: not valid JSON ({found.msg} at {line}column {found.colno})") from None


def _read_hub(spec: TaskSpec, split: str | None, streaming: bool = False) -> Any:
    import datasets

    try:
        more = {"revision": spec.revision, "streaming": streaming}
        return datasets.load_dataset(spec.source, spec.subset, split=split or spec.split, **more)
    except OSError as error:
        raise ConnectionError(
            f"could not load data set {spec.source!r} from the Hugging Face hub. Check the id and the network "
            f"(HF_HUB_OFFLINE, HF_TOKEN for gated data), or give the path of a .jsonl file. Cause: {error}"
        ) from error


def _from_table(table: Any, source: str) -> Iterator[tuple[Any, str]]:
    """Rows of a stream."""
    classes = _classes(table)
    for number, row in enumerate(table):
        named = {column: _class_name(names, row[column]) for column, names in classes.items()}
        yield row | named, f"row {number} of {source!r}"


def _with_class_names(table: Any) -> Rows:
    classes = _classes(table)

    def named(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return batch | {column: [_class_name(names, n) for n in batch[column]] for column, names in classes.items()}

    return table.with_transform(named)


def _classes(table: Any) -> dict[str, list[str]]:
    import datasets

    features = table.features or {}  # a stream may not know them
    return {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}


def _class_name(names: Sequence[str], number: int | None) -> str | None:
    """None where there is none, or -1 (unlabelled)."""
    return None if number is None or number < 0 else names[number]
