"""`alora` in this process: what it prints, how it refuses, and small recipes for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from typer.testing import CliRunner

from alora_kernels.cli.app import app

WIDE = {"COLUMNS": "160"}


def alora(*args: object) -> str:
    """What the command prints; it must end well."""
    result = CliRunner().invoke(app, list(map(str, args)), env=WIDE)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def refused(*args: object) -> str:
    """What the command prints that refuses its input."""
    result = CliRunner().invoke(app, list(map(str, args)), env=WIDE)
    assert result.exit_code == 2, result.output
    return result.output


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def recipe(folder: Path, jsonl: Path, **more: object) -> Path:
    """A recipe file for the tasks of a user's own file."""
    lines = {"tasks": f"[{{name: parity, source: {jsonl}}}]", "model": "tiny-random", "output": str(folder / "run"),
             "steps": 4, "batch_size": 8, "test_size": 10, "r": 2, **more}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text("\n".join(f"{k}: {v}" for k, v in lines.items()))
    return path
