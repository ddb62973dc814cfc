"""The command line as a function: what it printed, after its exit code was checked."""

from __future__ import annotations

import typer
from typer.testing import CliRunner


def invoke(app: typer.Typer, *args: object, code: int = 0, columns: int = 160) -> str:
    """Output of a command that must end with `code`; an error that is not told in a line is raised."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": str(columns)})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output
