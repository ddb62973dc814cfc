"""`alora verify`: what an adapter folder is, and whether it is still as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..recipes.display import say
from ..text import counted, listed, size
from . import command


def verify(adapter: Annotated[Path, typer.Argument(help="an adapter folder, ALoRA or stock LoRA")]) -> None:
    """Read every number of an adapter: exit code 0 if the folder is whole, 2 with the reason if it is not.

    Folders that this package wrote carry a SHA-256 of each tensor; others are checked for shape and finite numbers.
    """
    with command():
        from ..adapters.reader import read_adapter

        file = read_adapter(adapter)
    kind = "ALoRA" if file.config.kind == "alora" else "stock LoRA"
    dtype = str(file.dtype).removeprefix("torch.")
    say(f"{kind} adapter for {file.base or 'a base that it does not name'}")
    say(f"{counted(len(file.tasks), 'task')}: {listed(file.tasks, 8)}")
    say(f"{counted(len(file.shapes), 'module')}, rank {file.rank}, {dtype}, {size(file.stamp.bytes)}")
    tensors = counted(sum(map(len, file.keys.values())), "tensor")
    said = "as written, by SHA-256" if file.sums else "finite; it has no checksums (save it again to add them)"
    say(f"{tensors}: {said}")
