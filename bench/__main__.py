"""`python -m bench`: the benchmarks, one command each."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Benchmarks of alora-kernels, each verified against the float64 reference before it is timed."""


@app.command()
def cpu(
    m: int = typer.Option(512, help="tokens, a multiple of 16"),
    k: int = typer.Option(768, help="in_features"),
    n: int = typer.Option(768, help="out_features"),
    e: int = typer.Option(8, help="experts or tasks"),
    r: int = typer.Option(16, help="rank"),
    repeats: int = typer.Option(60, help="interleaved rounds"),
    threads: int = typer.Option(2, help="CPU threads"),
) -> None:
    """One layer, forward + backward, against the eager alternatives (about 10 s)."""
    from . import cpu as benchmark

    benchmark.run(m, k, n, e, r, repeats, threads)


if __name__ == "__main__":
    app()
