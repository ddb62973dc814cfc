"""How the tasks of a training run were asked, for whoever gets the adapter.

In:   the run's sources, their label words, and its rows.
Out:  a `TaskCard` per task: template, label words, a sample prompt.
Who:  `alora train` writes them beside the adapter.

A sample comes from built-in tasks alone, whose rows are public: a row of the user's own data must not leave with an
adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from alora_kernels.data.loading import as_source
from alora_kernels.data.sources import TaskSpec
from alora_kernels.data.tasks import Task

if TYPE_CHECKING:
    from datasets import DatasetDict

    from alora_kernels.adapters.cards import TaskCard


def task_cards(
    sources: Sequence[str | Task | TaskSpec], text: DatasetDict, words: Mapping[str, Sequence[str]]
) -> dict[str, TaskCard]:
    """Cards of all tasks that a run was trained on.

    Args:
        sources: as given to `load_tasks`.
        text: what it gave back.
        words: task -> its label words; a task that answers in texts is not in it.

    Returns:
        Task -> card. A task that a file's column names has the file's template; if several files could have named it
        and their templates differ, none.
    """
    from alora_kernels.adapters.cards import TaskCard

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
