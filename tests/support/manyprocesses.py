"""Trainings that tests run on one process and on several; `torchrun -m tests.support.manyprocesses FOLDER CASE...`.

Each case leaves what it found in FOLDER, a file per process: trained tensors, logs, the text of an error.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, IterableDataset, interleave_datasets
from datasets.distributed import split_dataset_by_node
from torch import nn

from alora_kernels.training import ALoRATrainer, TaskCollator

from . import mixtures
from . import trainers as t

WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
ROWS = 6  # of a step, on however many processes
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
FSDP_EXPERTS = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Qwen3MoeDecoderLayer"]}}
SHARDED = {"fsdp": True, "fsdp_config": {**FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Adapters that have begun to train, so that A has a gradient too, on a base of this dtype."""
    adapted = t.peft_model()
    generator = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "asymlora_B" in name:
            p.data.normal_(std=0.1, generator=generator)
        elif not p.requires_grad:
            p.data = p.data.to(dtype)
    return adapted


def mixture() -> nn.Module:
    """The same of a mixture: each expert has an A and a B of its own, and attention is adapted too."""
    adapted = mixtures.adapted(tasks=t.TASKS, target_modules=["q_proj"], experts_A="each", task_type="CAUSAL_LM")
    return adapted.train()


def one_task_each() -> Dataset:
    """Rows that go to two processes in turn by threes: all of `copy` to the first, of `next` to the second."""
    rows = t.rows(72)
    by_task = [[i for i in range(72) if rows[i]["task"] == task] for task in ("copy", "next")]
    return rows.select([i for k in range(0, 24, 3) for part in by_task for i in part[k : k + 3]])


def stream(part: Dataset) -> IterableDataset:
    return part.to_iterable_dataset()


def in_turn() -> IterableDataset:
    """Two streams of a task each, a row of each in turn."""
    rows = t.rows(72)
    parts = [rows.filter(lambda row, task=task: row["task"] == task) for task in ("copy", "next")]
    return interleave_datasets([stream(part) for part in parts])


class Noting(TaskCollator):
    """Notes the tasks of every row that this process gets."""

    def __call__(self, features: Any) -> dict[str, Any]:
        self.seen = getattr(self, "seen", set()) | {f["task"] for f in features}
        return super().__call__(features)


class Failing(TaskCollator):
    """Fails, or leaves the ids out, in the second batch of the last process."""

    def __init__(self, *args: Any, drops: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drops, self.batches = drops, 0

    def __call__(self, features: Any) -> dict[str, Any]:
        self.batches += 1
        batch = super().__call__(features)
        if self.batches == 2 and RANK == WORLD - 1:
            if not self.drops:
                raise OSError("a broken file")
            del batch["task_ids"]
        return batch


def trainer(folder: Path, data: Any, adapted: nn.Module | None = None, rows: int = ROWS, **changes: Any) -> Any:
    size = rows // WORLD // changes.get("gradient_accumulation_steps", 1)
    # with Adam's own epsilon of 1e-8 rounding alone moves what has next to no gradient by a whole learning rate
    defaults = dict(per_device_train_batch_size=size, padding_free=False, weight_decay=0.1, adam_epsilon=1e-3)
    return t.trainer_on(folder, data, model() if adapted is None else adapted, **{**defaults, **changes})


def whole(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, gathered from all processes, under the names of one."""
    tensors = {name.replace("._checkpoint_wrapped_module", ""): p for name, p in t.trained(adapted).items()}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in tensors.items()}


def run(made: ALoRATrainer, resume: str | None = None, **more: Any) -> dict[str, Any]:
    made.train(resume_from_checkpoint=resume)
    return {"tensors": whole(made.model), "logs": made.state.log_history, **more}


def plain(folder: Path, **changes: Any) -> dict[str, Any]:
    """Past the end of an epoch that is no multiple of the batch, with an evaluation of an odd number of rows."""
    made = trainer(folder, t.rows(50), max_steps=11, eval_dataset=t.texts(17), **changes)
    found = run(made)
    return found | {"metrics": made.evaluate()}


def accumulated(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = dict(gradient_accumulation_steps=3, train_sampling_strategy="sequential")
    return run(trainer(folder, t.texts(48), rows=12, **settings, **changes))


def absent(folder: Path, **changes: Any) -> dict[str, Any]:
    made = trainer(folder, one_task_each(), train_sampling_strategy="sequential", **changes)
    return run(made, before=whole(model()))


def streamed(folder: Path) -> dict[str, Any]:
    collator = Noting(0, t.TASKS, model=(adapted := model()))
    made = trainer(folder, in_turn(), adapted, rows=2, max_steps=8, data_collator=collator)
    return run(made) | {"seen": collator.seen}


def split_stream(folder: Path) -> dict[str, Any]:
    return run(trainer(folder, split_dataset_by_node(in_turn(), RANK, WORLD)))


def evaluated_stream(folder: Path) -> dict[str, Any]:
    return trainer(folder, t.rows(48), eval_dataset=stream(t.rows(9))).evaluate()


def failing(folder: Path, drops: bool) -> dict[str, Any]:
    return run(trainer(folder, t.rows(48), data_collator=Failing(0, t.TASKS, drops=drops)))


def other_tables(folder: Path) -> dict[str, Any]:
    names, t.TASKS[:] = list(t.TASKS), t.TASKS[:: 1 if RANK == 0 else -1]
    try:
        return run(trainer(folder, t.rows(48)))
    finally:
        t.TASKS[:] = names


def saved(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Checkpoints after two of four steps and at the end, in a folder that other cases go on from."""
    return run(trainer(folder.parent / name, t.rows(48), save_strategy="steps", save_steps=2, **changes))


def resumed(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    made = trainer(folder, t.rows(48), **changes)
    return run(made, str(folder.parent / name / "checkpoint-2"))


BF16 = torch.bfloat16
CASES: dict[str, Any] = {
    "plain": plain,
    "accumulated": accumulated,
    "checkpointed": lambda f: accumulated(f, gradient_checkpointing=True),
    "absent": absent,
    "bf16": lambda f: absent(f, adapted=model(BF16)),
    "streamed": streamed,
    "split stream": split_stream,
    "evaluated stream": evaluated_stream,
    "no ids": lambda f: failing(f, drops=True),
    "broken row": lambda f: failing(f, drops=False),
    "other tables": other_tables,
    "saved": lambda f: saved(f, "ddp"),
    "resumed": lambda f: resumed(f, "ddp"),
    "fsdp plain": lambda f: plain(f, **FSDP),
    "fsdp checkpointed": lambda f: accumulated(f, gradient_checkpointing=True, **FSDP),
    "fsdp absent": lambda f: absent(f, **FSDP),
    "fsdp bf16": lambda f: absent(f, adapted=model(BF16), **FSDP),
    "fsdp saved": lambda f: saved(f, "full", **FSDP),
    "fsdp resumed": lambda f: resumed(f, "full", **FSDP),
    "fsdp sharded": lambda f: saved(f, "sharded", **SHARDED),
    "fsdp sharded resumed": lambda f: resumed(f, "sharded", **SHARDED),
    "fsdp from ddp": lambda f: resumed(f, "ddp", **FSDP),
    "ddp from fsdp": lambda f: resumed(f, "full"),
    "fsdp 1": lambda f: run(trainer(f, t.rows(12), fsdp=True, fsdp_config={"version": 1})),
    "experts": lambda f: accumulated(f, adapted=mixture()),
    "experts saved": lambda f: saved(f, "experts ddp", adapted=mixture()),
    "fsdp experts": lambda f: accumulated(f, adapted=mixture(), gradient_checkpointing=True, **FSDP_EXPERTS),
    "fsdp experts saved": lambda f: saved(f, "experts full", adapted=mixture(), **FSDP_EXPERTS),
    "fsdp experts resumed": lambda f: resumed(f, "experts full", adapted=mixture(), **FSDP_EXPERTS),
    "left alone": lambda f: run(trainer(f, t.rows(12), use_cpu=False)),
}  # fmt: skip


def forget() -> None:
    """What accelerate keeps for a whole process; the process group stays."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    PartialState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def outcome(name: str, folder: Path) -> dict[str, Any]:
    """What a case found; of one that fails, `error`."""
    forget()
    try:
        return CASES[name](folder / name)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def results(folder: Path, name: str, world: int) -> Iterator[dict[str, Any]]:
    """What every process of such a run found."""
    for rank in range(world):
        yield torch.load(folder / f"{name}.{world}.{rank}.pt", weights_only=False)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for case in sys.argv[2:]:
        torch.save(outcome(case, place), place / f"{case}.{WORLD}.{RANK}.pt")
