"""Which tasks of a folder are loaded, and under what names.

In:   an adapter folder, and what the caller asked for.
Out:  pairs of names: in the store and in the folder.
Who:  `TaskStore.load`.

The names in the store are what clients send as the model: they are kept to letters and marks that need no quoting.
"""

from __future__ import annotations

import re

from ..adapters.config import refused
from ..adapters.reader import AdapterFile
from ..modules.tasks import BASE

SHOWN = 20  # names in an error
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def chosen(file: AdapterFile, name: str | None, task: str | None) -> list[tuple[str, str]]:
    """(name in the store, name in the file) of what is to be loaded.

    Args:
        file: the folder.
        name: of one task in the store; None keeps the names of the file.
        task: its name in the file; None takes the only one, or the one called `name`.

    Raises:
        AdapterFolderError: a name that is not allowed.
    """
    if task is None and name is not None:
        task = file.tasks[0] if len(file.tasks) == 1 else name
    if task is not None and task not in file.tasks:
        listed = ", ".join(map(repr, file.tasks[:SHOWN])) + (" and more" if len(file.tasks) > SHOWN else "")
        raise refused(file.folder, f"has no task {task[:140]!r}: it has {listed}; say which with task=...")
    pairs = [(own, own) for own in file.tasks] if task is None else [(task if name is None else name, task)]
    for public, own in pairs:
        if public == BASE or not NAME.fullmatch(public):
            raise refused(
                file.folder,
                f"a task cannot be called {public[:140]!r}: names are 1 to 128 letters, digits, '.', '_', ':' or '-'"
                f" and begin with a letter or digit; load it with task={own!r} and another name, such as"
                f" name={_allowed(own)!r} (lora_name over HTTP), or give it one with `alora export`",
            )
    return pairs


def _allowed(name: str) -> str:
    """A name that is allowed and looks like this one."""
    return re.sub(r"[^A-Za-z0-9._:-]+", "-", name).strip("._:-")[:128] or "task"
