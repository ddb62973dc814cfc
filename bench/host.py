"""What Python costs a layer on a GPU, beside another commit of this package: `python -m bench host` (a minute).

CPU time of one thread, launches replaced by nothing; `layers/host_worker.py` says what is and is not in the number.
Passes: "forward" without gradients, "recorded forward", with them, "forward+backward".
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .models import build
from .models.build import BUILD, Worker
from .report.rows import BOTH, EAGER, FORWARD, RESULTS, Row
from .report.targets import FUSED, HOST_TARGETS, RECORDED
from .run import Candidate, Check, Ready, Work, checked, measure
from .timing import Run

LAYERS = {"fused": "host FusedALoRALinear", "peft": "host PEFT layer"}
SIZES = {"rows": 4, "tokens": 64, "width": 64, "r": 8, "tasks": 4}
UNSET = ("TRITON_INTERPRET", "ALORA_BACKEND")
COMMIT = "316402d"  # main before this command
SCRIPT = str(Path(__file__).parent / "layers" / "host_worker.py")


def work(kind: str, python: Path) -> Work:
    """One kind of layer, of this checkout and of the other commit's package."""
    m, width = SIZES["rows"] * SIZES["tokens"], SIZES["width"]
    sizes: dict[str, Any] = {"m": m, "k": width, "n": width, "r": SIZES["r"], "e": SIZES["tasks"]}
    row = Row(case=LAYERS[kind], routing="task", dtype="float16", note="CPU time, as for sm_90", **sizes)
    pythons = {FUSED: None, BUILD: python}
    return Work(row, (FORWARD, RECORDED, BOTH), lambda: [_candidate(n, kind, p) for n, p in pythons.items()])


def _candidate(name: str, kind: str, python: Path | None) -> Candidate:
    worker = Worker({"layer": kind, "sizes": SIZES}, python, SCRIPT, UNSET)

    def prepare(direction: str, mode: str) -> Ready:
        launches = worker.ask(direction)["launches"]
        check = Check(0.0 if launches >= 2 else float("nan"), 0.0, "launches")  # a path that launches nothing is none
        return Ready(lambda: worker.ask(direction)["seconds"], check)

    return Candidate(name, "task", lambda direction, mode: None, prepare)


def as_told(run: Run) -> float:
    """The clock of calls that return how many seconds they took."""
    seconds = run()
    assert isinstance(seconds, float)
    return seconds


def main(
    build_venv: Annotated[Path, typer.Option(help="folder of the earlier commit's venv, made where it is missing")],
    build_commit: Annotated[str, typer.Option("--build", help="the earlier commit to compare with")] = COMMIT,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds of 100 calls")] = 40,
    out: Annotated[Path, typer.Option(help="rows are appended to this CSV")] = RESULTS / "host.csv",
) -> None:
    """Python's time of a layer on a GPU, without one, beside another commit (a minute)."""
    python = checked("--build", build.install, build_commit, build_venv)
    works = [work(kind, python) for kind in LAYERS]
    measure(
        "host", "cpu", works, [EAGER], out=out, repeats=repeats, denominator=BUILD, targets=HOST_TARGETS, clock=as_told
    )
