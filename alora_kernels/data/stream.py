"""Rows that are read while training: each task an endless stream of token ids, mixed by weights.

`load_tasks(streaming=True)` has read the head of every source, with all rows that judge; here the same sources are read
again from their beginning, without those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from .encoding import Lost, encode_batch, features_of_ids
from .forms import Example, form_of, to_example
from .loading import as_source, spec_of
from .sources import HELD, FileRows, TaskSpec, raw_rows
from .tasks import Task

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDataset

CHUNK = 100  # rows read at a time
BUFFER = 1000  # rows of a task among which the next one is drawn


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
    from datasets import Features, IterableDataset, Value, interleave_datasets

    lost, known = lost or Lost(), [as_source(source) for source in sources]
    judge = [Example(**row) for split in HELD if split in text for row in text[split]]
    held = frozenset((example.task, example.question) for example in judge)
    features = Features(dict.fromkeys(Example._fields, Value("string")))
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
