"""Two processes of one group on this machine, for what is split over processes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def _rank(rank: int, work: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    torch.save(work(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_ranks(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `work(*args)` gives on each of two ranks; if one of them raises, its traceback."""
    folder.mkdir()
    mp.spawn(_rank, (work, folder, args), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
