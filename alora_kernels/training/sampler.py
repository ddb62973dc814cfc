"""Which example comes next when several tasks are trained at once.

In:   the task of every example, a temperature, a seed.
Out:  an order of examples for an epoch, the tasks spread evenly through it, so that every batch is mixed.
Who:  `ALoRATrainer`; usable with any `DataLoader`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ..modules.tasks import plain_task


class TaskBalancedSampler(Sampler[int]):
    """Examples in an order that mixes tasks, small tasks repeated or large ones thinned by temperature.

    Formula: task t gets a share of the epoch proportional to `n_t ** (1 / temperature)`. At 1 every example is
    drawn once; towards infinity all tasks come equally often.

    Args:
        tasks: the task of each example, a name or an id; a tensor or an array of ids is grouped by value.
        temperature: T >= 1.
        seed: with the epoch it determines the order.

    Raises:
        ValueError: no examples, or a temperature below 1.

    Source: temperature-scaled mixing, Raffel et al. 2020 (T5), section 3.5.2.
    """

    def __init__(self, tasks: Sequence[str | int], *, temperature: float = 1.0, seed: int = 0) -> None:
        if len(tasks) == 0:
            raise ValueError("the training set is empty")
        if temperature < 1.0:
            raise ValueError(f"temperature must be at least 1 (1 keeps the sizes), got {temperature}")
        self.seed, self.epoch = seed, 0
        self._members: dict[str | int, list[int]] = {}
        for index, task in enumerate(tasks):
            self._members.setdefault(plain_task(task), []).append(index)
        self.counts = _shares({task: len(m) for task, m in self._members.items()}, temperature)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; called by the trainer, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        placed: list[tuple[float, int]] = []
        for task, members in self._members.items():
            count = self.counts[task]
            # each pass over a task is its own shuffle, so an example repeats only after all others came
            passes = [torch.randperm(len(members), generator=generator) for _ in range(-(-count // len(members)))]
            order = torch.cat(passes)[:count].tolist()
            # the j-th draw of a task lands in the j-th of count equal slices of the epoch
            places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
            placed += zip(places.tolist(), (members[i] for i in order), strict=True)
        return iter([index for _, index in sorted(placed)])


def _shares(sizes: dict[str | int, int], temperature: float) -> Counter[str | int]:
    """How many draws each task gets in an epoch; together about as many as there are examples."""
    total = sum(sizes.values())
    weights = {task: size ** (1.0 / temperature) for task, size in sizes.items()}
    scale = total / sum(weights.values())
    return Counter({task: max(1, round(weight * scale)) for task, weight in weights.items()})
