"""`python -m bench`: the benchmarks, one command each."""

from __future__ import annotations

import importlib.util

import typer

from . import accuracy, cpu, gpu, moe, plot, processes, verify_lm_eval, verify_quant, verify_vllm
from .reproduce import command as reproduce
from .serving import command as serving

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Benchmarks of alora-kernels. Every result is verified against float64 before it is timed.",
)
app.command("cpu")(cpu.main)
app.command("gpu")(gpu.main)
app.command("moe")(moe.main)
app.command("accuracy")(accuracy.main)
app.command("plot")(plot.main)
app.command("processes")(processes.main)
app.command("verify-quant")(verify_quant.main)
app.command("serving")(serving.main)
app.command("reproduce")(reproduce.main)
app.command("verify-lm-eval")(verify_lm_eval.main)
app.command("verify-vllm")(verify_vllm.main)
if importlib.util.find_spec("flwr") is not None:  # a bare GPU machine measures without the extras
    from .chaos import command as chaos

    app.command("chaos")(chaos.main)
if importlib.util.find_spec("triton") is not None:  # only Linux has it
    from . import host
    from .static import command as static

    app.command("host")(host.main)
    app.command("static")(static.main)

if __name__ == "__main__":
    app()
