"""The command line as a function: what it printed, after its exit code was checked; small recipes for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import typer
from typer.testing import CliRunner

from alora_kernels.cli.app import app


def invoke(app: typer.Typer, *args: object, code: int = 0, columns: int = 160) -> str:
    """Output of a command that must end with `code`; an error that is not told in a line is raised."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": str(columns)})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


alora = partial(invoke, app)
refused = partial(invoke, app, code=2)


def recipe(folder: Path, jsonl: Path, **more: object) -> Path:
    """A recipe file for the tasks of a user's own file."""
    lines = {"tasks": f"[{{name: parity, source: {jsonl}}}]", "model": "tiny-random", "dtype": "float32",
             "output": str(folder / "run"), "steps": 4, "batch_size": 8, "test_size": 10, "r": 2, "save_steps": 0,
             **more}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text("\n".join(f"{k}: {v}" for k, v in lines.items()))
    return path
