"""Peak memory of a training step with a large vocabulary, each provider in a fresh process that keeps nothing else.

8 rows of 1,024 tokens and 128,256 words: the logits of all of them take 4.2 GB in float32. The column `peak_mb` is the
whole process, libraries included, up to the end of its first step. Loss and gradients are compared with one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report.rows import BOTH, Row
from ..run import Check, Ready
from .build import BUILD, Worker, missing
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


class MemoryWork:
    """A `run.Work`: the step with one share of labels."""

    directions: Sequence[str] = (BOTH,)
    repeats = 0.0  # memory is what counts: one step to warm up, one that is timed

    def __init__(self, case: str, names: Sequence[str], python: Path | None) -> None:
        self.names, self._python, self._every = names, python, SHARES[case]
        width = SHAPE["hidden_size"]
        self.row = Row(
            case=case, routing="task", m=ROWS * TOKENS, k=width, n=SHAPE["vocab_size"], r=8, e=TASKS, dtype="float32",
            note=f"{SHAPE['num_hidden_layers']} layers, n is the vocabulary; peak of the process in its first step",
        )  # fmt: skip

    def candidates(self) -> Sequence[MemoryCandidate]:
        """Both of one comparison."""
        given, agreed = job(self._every), Agreed()
        pythons = {FUSED: None, BUILD: self._python}
        return [MemoryCandidate(name, Worker(given, pythons[name]), agreed) for name in self.names]


class Agreed:
    """What the first provider found, which the others must find too."""

    results: dict[str, Tensor]

    def check(self, got: dict[str, Tensor]) -> Check:
        if not hasattr(self, "results"):
            self.results = got
        return judged(got, {name: t.double() for name, t in self.results.items()}, ALLOWED)


@dataclass
class MemoryCandidate:
    name: str
    worker: Worker
    agreed: Agreed
    computes: str = "task"

    def reason(self, direction: str, mode: str) -> str | None:
        return missing(self.name, self.worker.python)

    def prepare(self, direction: str, mode: str) -> Ready:
        self.worker.step()
        return Ready(self.worker.step, self.agreed.check(self.worker.results()), self.worker.peak_mb)
