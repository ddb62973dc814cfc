"""The demo's training step, a batch of its own recipe through our trainer's loss, beside stock PEFT and another commit.

Adapters are float32 over any base, as all start. PEFT gets each task's rows padded to that task's longest, and the loss
in two ways: the logits that the labels need, as a careful user asks for, and by `labels=`. The other commit runs in
float32, its default, in a process of its own; its loss and gradients are judged like ours in float32.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alora_kernels.data.packages import MissingPackageError
from alora_kernels.recipes.demo import RECIPE
from alora_kernels.training import TaskBalancedSampler, TaskCollator
from alora_kernels.training.loss import kept_positions, next_labels

from ..run import Check, Work
from .build import BUILD, STRIDED, Worker, missing
from .pair import FUSED, ONE, Setting, judged, model_work
from .training import PLAIN, SMOLLM2, STOCK, Training, base_model, in_cache, smollm_note
from .worker import adapter_numbers, trainer_step

Rows = Sequence[Mapping[str, Any]]
TOKENS = RECIPE.max_length or 48  # never null
STEP = Setting(
    "demo step", tasks=len(RECIPE.tasks), rows=RECIPE.batch_size, tokens=TOKENS, r=RECIPE.r,
    alpha=int(RECIPE.lora_alpha),
)  # fmt: skip


def demo_rows() -> Rows:
    """The first batch of the demo; without its data rows of such lengths with a label word and an end."""
    from alora_kernels import data

    try:
        tokenizer = data.load_model(RECIPE.model)[1] if in_cache() else None
        lost = data.Lost()
        text = data.load_tasks(RECIPE.tasks, seed=RECIPE.seed, train_size=RECIPE.train_size, test_size=1, lost=lost)
    except MissingPackageError:
        tokenizer = None
    if tokenizer is None:
        draw = random.Random(0)
        lengths = [draw.randint(16, TOKENS) for _ in range(RECIPE.batch_size)]
        ids = [[draw.randrange(9, SMOLLM2["vocab_size"]) for _ in range(length)] for length in lengths]
        names = [str(task) for task in RECIPE.tasks]
        return [
            {"input_ids": row, "labels": [-100] * (len(row) - 2) + row[-2:], "task": names[i % len(names)]}
            for i, row in enumerate(ids)
        ]
    train = data.encode(text["train"], tokenizer, TOKENS, lost=lost)
    order = list(TaskBalancedSampler(train["task"], temperature=RECIPE.temperature, seed=RECIPE.seed))
    return [train[i] for i in order[: RECIPE.batch_size]]


class DemoStep(Training):
    """The step of all providers; `exact` is the same in float32, for the other commit, which runs in `python`."""

    widens, repeats = True, 1 / 12

    def __init__(self, setting: Setting, python: Path | None, exact: DemoStep | None = None) -> None:
        super().__init__(partial(base_model, setting.dtype), setting)
        self._python, self._exact = python, exact or self

    def reason(self, name: str, mode: str) -> str | None:
        return missing(name, self._python) or super().reason(name, mode)

    def step(self, name: str) -> tuple[Tensor]:
        if name == FUSED:
            return (self._ours(),)
        if name == BUILD:
            self._exact.worker.step()
            return (torch.zeros(()),)
        how = {"plainly": True} if name == PLAIN else {}
        return (self._task_by_task(self.stock, [self._whole] if name == ONE else None, **how),)

    def results(self, name: str, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        if name != BUILD:
            return super().results(STOCK if name == PLAIN else name, outputs)
        got = self._exact.worker.results()
        paths = [path for path, _ in self.layers()]
        found = {f"{path} {letter}": got[f"{path}.asymlora_{letter}.default"] for path in paths for letter in "AB"}
        return found | {"loss": got["loss"]}

    def check(self, name: str, outputs: Sequence[Tensor]) -> Check:
        """What runs in float32 whatever the others do is judged in float32."""
        if name != BUILD:
            return super().check(name, outputs)
        return judged(self.results(name, outputs), self._exact.truth, max(self._exact.allowed, STRIDED))

    @property
    def tasks(self) -> list[str]:
        return [str(task) for task in RECIPE.tasks]

    @cached_property
    def rows(self) -> Rows:
        return self._exact.rows if self._exact is not self else demo_rows()

    @cached_property
    def worker(self) -> Worker:
        numbers = {name: p.detach() for name, p in adapter_numbers(self.fused).items()}
        options = {"r": self.setting.r, "lora_alpha": self.setting.alpha, "target_modules": "all-linear"}
        job = {"adapter": options | {"tasks": self.tasks}, "numbers": numbers, "rows": [dict(row) for row in self.rows]}
        return Worker(job | {"model": RECIPE.model, "shape": {} if in_cache() else SMOLLM2}, self._python)

    @cached_property
    def _ours(self) -> Any:
        return trainer_step(self.fused, self.rows, None, Path(gettempdir()) / "bench-demo-step")

    def _padded(self, rows: Rows) -> dict[str, Tensor]:
        batch = TaskCollator(None, (), model=self.fused)([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        return self._padded(self.rows)

    @cached_property
    def _rows_of(self) -> Sequence[Any]:
        return [self._padded([row for row in self.rows if row["task"] == task]) for task in self.tasks]

    def _loss(self, model: Any, tokens: Any, plainly: bool = False, **inputs: Any) -> Tensor:
        """The share of a padded part of the batch in its mean loss, so that parts add up."""
        inputs, total = dict(tokens), int((self._whole["labels"] != -100).sum())
        if plainly:
            loss: Tensor = model(**inputs, num_items_in_batch=total).loss
            return loss
        labels = inputs.pop("labels")
        keep = kept_positions(labels)
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()
        aligned = next_labels(labels[:, keep])
        return F.cross_entropy(logits.flatten(0, 1), aligned.flatten(), reduction="sum") / total


def demo_works(names: Sequence[str], settings: Sequence[Setting], python: Path | None) -> list[Work]:
    """The step in each setting, which differ in case and dtype; `python` finds the other commit's package."""
    exact = DemoStep(STEP, python)
    found, data = [], "" if in_cache() else "; random rows of such lengths"
    for setting in settings:
        models = exact if setting == STEP else DemoStep(setting, python, exact)
        note = f"{smollm_note()}; {setting.rows} rows of at most {setting.tokens} tokens{data}; adapters in float32"
        if python is not None:
            note += f"; {BUILD} always in float32"
        found.append(model_work(names, models, width=576, note=note))
    return found
