"""Peak memory of a training step with a large vocabulary, each provider in a fresh process that keeps nothing else.

8 rows of 1,024 tokens and 128,256 words: the logits of all of them take 4.2 GB in float32. The column `peak_mb` is the
whole process, libraries included, up to the end of its first step. Loss and gradients are compared with one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report.rows import BOTH, Row
from ..run import Candidate, Ready, Work
from .build import BUILD, STRIDED, Worker, missing
from .pair import FUSED, judged

MODELS = (FUSED, BUILD)
SHARES = {"memory 1 in 8 labelled": 8, "memory all labelled": 1}  # case -> every so-many-th token has a label
ROWS, TOKENS, TASKS, ALLOWED = 8, 1024, 4, 1e-4
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128256
}  # fmt: skip


def job(every: int) -> dict[str, Any]:
    """A worker's job with random rows of which every so-many-th token is labelled."""
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(TOKENS) % every == every - 1, -100)
    names = [f"task {i % TASKS}" for i in range(ROWS)]
    rows = [
        {"input_ids": i, "labels": label, "task": name}
        for i, label, name in zip(ids.tolist(), labels.tolist(), names, strict=True)
    ]
    adapter = {"r": 8, "lora_alpha": 16, "tasks": names[:TASKS], "target_modules": "all-linear"}
    return {"shape": SHAPE, "adapter": adapter, "numbers": None, "rows": rows}


def memory_work(case: str, names: Sequence[str], python: Path | None) -> Work:
    """The step with one share of labels; the others must find what the first provider found."""
    row = Row(
        case=case, routing="task", m=ROWS * TOKENS, k=SHAPE["hidden_size"], n=SHAPE["vocab_size"], r=8, e=TASKS,
        dtype="float32",
        note=f"{SHAPE['num_hidden_layers']} layers, n is the vocabulary; peak of the process in its first step",
    )  # fmt: skip

    def candidates() -> list[Candidate]:
        given, agreed = job(SHARES[case]), dict[str, Tensor]()
        return [candidate(name, Worker(given, python if name == BUILD else None), agreed) for name in names]

    # no rounds: memory is what counts, so one step warms up and one is timed
    return Work(row, [BOTH], candidates, repeats=0.0)


def candidate(name: str, worker: Worker, agreed: dict[str, Tensor]) -> Candidate:
    """A provider in its own process; `agreed` is what the first one found, in float64."""

    def prepare(direction: str, mode: str) -> Ready:
        worker.step()
        got = worker.results()
        if not agreed:
            agreed.update({name: t.double() for name, t in got.items()})
        allowed = STRIDED if name == BUILD else ALLOWED
        return Ready(worker.step, judged(got, agreed, allowed), worker.peak_mb)

    return Candidate(name, "task", lambda direction, mode: missing(name, worker.python), prepare)
