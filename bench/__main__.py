"""`python -m bench`: the benchmarks, one command each."""

from __future__ import annotations

import importlib.util

import typer

from . import cpu

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Benchmarks of alora-kernels, each verified against the float64 reference before it is timed.",
)
app.command("cpu")(cpu.main)
if importlib.util.find_spec("triton") is not None:  # only Linux has it
    from . import static

    app.command("static")(static.main)

if __name__ == "__main__":
    app()
