"""Adapter folders with chosen numbers, written as PEFT and `alora fed` write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alora_kernels import files
from alora_kernels.analysis import Analysis
from alora_kernels.analysis.comparison import compare_units
from alora_kernels.analysis.sources import units

from ..support.adapters import PREFIX, Matrices, alora, written

Q, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


randn64 = partial(randn, dtype=torch.float64)


def compared(*folders: Path, **options: Any) -> Analysis:
    """The comparison of all units of some folders."""
    return compare_units([unit for folder in folders for unit in units(folder)], **options)


def study_of(folder: Path, tasks: Sequence[str], layers: int = 3, **more: str) -> Analysis:
    """The comparison of the tasks of an ALoRA adapter at two modules per layer."""
    modules = [name.format(n) for n in range(layers) for name in (Q, UP)]
    a = {m: randn(len(tasks), 2, 8, seed=i) for i, m in enumerate(modules)}
    return compared(alora(folder, tasks, a, {m: randn(6, 2) for m in modules}, **more))


def vera(path: Path, d: Matrices, b: Matrices) -> Path:
    """module -> lambda_d `[R]` and lambda_b `[N]`, with the frozen projections beside them."""
    tensors = {f"{PREFIX}{m}.vera_lambda_d": t for m, t in d.items()} | {
        f"{PREFIX}{m}.vera_lambda_b": t for m, t in b.items()
    }
    return written(path, tensors | {"base_model.vera_A": randn(2, 3)}, peft_type="VERA", r=2, base=None)


def unequal(path: Path, parts: Mapping[str, Tensor], method: str = "fed-alora-het", **more: str) -> Path:
    """A client's final.safetensors."""
    files.write(path / "final.safetensors", parts, {"method": method, **more})
    return path


def het(module: str, r: int, d_m: int = 3, k: int = 5, n: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """The five matrices of a client of rank r; B is the same for all."""
    shapes = {"A": (r, k), "M": (d_m, r), "B1": (r, d_m), "B2": (n, r)}
    own = {f"{module}.{part}": randn(*shape, seed=seed + i) for i, (part, shape) in enumerate(shapes.items())}
    return own | {f"{module}.B": randn(n, d_m, seed=99), "head.weight": randn(2, 4)}


def orthogonal(k: int = 12, r: int = 2, count: int = 3) -> list[Tensor]:
    """Matrices `[r, k]` whose rows are all at right angles to each other."""
    basis = torch.linalg.qr(randn(k, k, seed=5).double()).Q
    return [basis[i * r : (i + 1) * r].clone() for i in range(count)]


def turned(angles: Sequence[float], k: int = 12) -> tuple[Tensor, Tensor]:
    """Two matrices of as many rows as there are angles, which are their principal angles, in a random basis of R^k."""
    p, q = orthogonal(k, len(angles), 2)
    theta = torch.tensor(angles, dtype=torch.float64)[:, None]
    return p, theta.cos() * p + theta.sin() * q
