"""Notebooks, executed: `python -m tests.support.notebooks` writes the outputs that are committed (minutes)."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

QUIET = "ignore:IProgress not found,ignore:`is_gradient_checkpointing`"  # of tqdm and transformers, not of ours
NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def executed(path: Path, folder: Path, **parameters: Any) -> NotebookNode:
    """A notebook after a run in `folder`, its cell tagged "parameters" replaced by those given.

    An AssertionError names the notebook, the cell (from 1, as an editor counts them) and what it raised.
    """
    book = nbformat.read(path, as_version=4)
    if parameters:
        [cell] = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
        cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(book, timeout=3600, kernel_name="python3", record_timing=False, resources=resources)
    try:
        client.execute(env=os.environ | {"PYTHONWARNINGS": QUIET})
    except CellExecutionError as error:
        raise AssertionError(f"{path.name}, {failed(book)}: {error.ename}: {error.evalue}") from error
    return book


def failed(book: NotebookNode) -> str:
    """Where the first error of a notebook stands."""
    for number, cell in enumerate(book.cells, 1):
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            return f"cell {number}, which begins {cell.source.splitlines()[0]!r}"
    return "no cell"


if __name__ == "__main__":
    for notebook in map(Path, sys.argv[1:] or NOTEBOOKS):
        with tempfile.TemporaryDirectory() as place:
            made = executed(notebook, Path(place))
        made.metadata = {"kernelspec": made.metadata.kernelspec, "language_info": {"name": "python"}}
        nbformat.write(made, notebook)
