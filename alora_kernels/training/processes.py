"""A training on several processes: what they must agree on, and how rows are dealt to them.

A process that fails alone leaves the others waiting in a collective, so what can be foreseen is refused by all at once.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import IterableDataset

from .rules import IGNORED
from .tasks import all_per_row


def check_alike(tables: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError in every process unless all have these tables of tasks; all must call this."""
    everywhere = gather_object([{name: tuple(table) for name, table in tables.items()}])
    for rank, other in enumerate(everywhere):
        for name in dict.fromkeys([*everywhere[0], *other]):
            one, two = (", ".join(known.get(name, ())) or "none" for known in (everywhere[0], other))
            if one != two:
                raise ValueError(
                    f"processes have different tasks: {name} of process 0 has {one}; of process {rank} it has {two}. An"
                    " id would train another matrix on each: give all the same tasks in the same order"
                )


def agree_on_batches(accelerator: Any, with_ids: Sequence[bool], error: Exception | None) -> None:
    """Raise in every process if one could not read its batches, or if `task_ids` are in the batches of some only."""
    mine = torch.tensor([[error is not None, any(with_ids), not all(with_ids)]], device=accelerator.device)
    failed, have, lack = accelerator.gather(mine.int()).T.bool()
    if error is not None:
        raise error
    if failed.any():
        raise ValueError(f"process {int(failed.int().argmax())} could not use its batch and says why")
    if have.any() and lack.any():
        raise ValueError(
            f"a batch of process {int(lack.int().argmax())} has no task_ids, others have: let the data_collator return"
            " them for every batch, or give every row a task"
        )


def check_launch(args: Any, processes: int) -> None:
    """Raise ValueError where Trainer would copy a model to several GPUs of one process, or each process train alone."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1 < started:
        raise ValueError(f"{started} processes were started, and each would train alone: on CPUs say use_cpu=True")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process has {args.n_gpu} GPUs: start one on each (torchrun --nproc-per-node {args.n_gpu}), or let it"
            " see one (CUDA_VISIBLE_DEVICES=0)"
        )


def own_rows(accelerator: Any, batch: dict[str, Any], drawn: int, size: int) -> dict[str, Any]:
    """An epoch's last batch of this process, without the rows that accelerate repeats to make all equally long.

    `drawn` rows are in the epoch, `size` in a batch of a process. One row stays, unlabelled where it is a repeated one;
    where labels are floats, none of which counts for nothing, the batch stays as it is.
    """
    if "labels" not in batch or batch["labels"].is_floating_point():
        return batch
    rest = drawn % (size * accelerator.num_processes)
    own = min(max(rest - size * accelerator.process_index, 0), size) if rest else size
    if own == size or not all_per_row(batch):
        return batch
    batch = {name: value[: max(own, 1)] for name, value in batch.items()}
    return batch if own else batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


def batch_means(counts: Tensor, losses: Tensor, size: int) -> list[tuple[float, int]]:
    """Mean loss per label and rows of every process's batch of `size` rows, the last of which may be short."""
    parts = zip(counts.split(size), losses.split(size), strict=True)
    return [(float(loss.sum() / count.sum()), len(count)) for count, loss in parts if count.any()]


def check_whole(stream: Any, description: str) -> None:
    """Raise ValueError for a stream that was split already: it would be split once more."""
    if getattr(getattr(stream, "_distributed", None), "world_size", 1) > 1:
        raise ValueError(
            f"the {description.lower()} stream is split by split_dataset_by_node, which gives a process whole shards,"
            " so perhaps one task alone: give the whole stream, its rows are dealt to the processes here"
        )


class Dealt(IterableDataset[Any]):
    """A stream in which the rows of each step are shuffled, so that tasks that come in turn come to every process.

    Formula: rows `k * size` to `(k + 1) * size - 1` in an order that the seed and k determine; as many rows of each
    task are in a step as before.
    """

    def __init__(self, stream: Any, size: int, seed: int) -> None:
        self.stream, self.size, self.seed = stream, size, seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of a stream that knows epochs."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Any]:
        generator, rows = random.Random(self.seed), iter(self.stream)
        while step := list(islice(rows, self.size)):
            generator.shuffle(step)
            yield from step
