"""`import_lora`: many stock LoRAs as one ALoRA adapter with the best shared B, and how much that loses.

With D_i = s_i B_i A_i, the B of R columns that is closest to all of them in the Frobenius norm is spanned by the R
leading left singular vectors of [D_1 ... D_n], and A_i' = B^T D_i (Eckart & Young 1936). D is N x nK and never formed:
with A_i^T = Q_i R_i, the matrix of all G_i = s_i B_i R_i^T (N x sum r) has the same left singular vectors and values.
LoRAs that were trained apart share no B, so one B of their rank loses much, and only more rank helps.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules.adapter import task_names
from ..tuner.card import model_card
from ..tuner.config import CONFIG, PREFIX, ALoRAConfig
from .cards import read_task_cards, write_task_cards
from .reader import AdapterFile, Factors, Shape, read_adapter
from .writer import check_replaceable, target_names, write_adapter

GOALS = (0.10, 0.01)  # errors whose rank the report names
Errors = dict[str, list[float]]  # module -> of each task


class SharedB(NamedTuple):
    """One module of several adapters over one B."""

    b: Tensor  # [N, R]
    a: Tensor  # [E, R, K]
    sigma: Tensor  # the singular values of [D_1 ... D_E], falling
    norms: list[float]  # ||D_i||_F
    lost: list[float]  # ||D_i - B A_i||_F


def shared_b(factors: Sequence[Factors | None], shape: Shape) -> SharedB:
    """The best B of R columns for the same module of several adapters, in float64.

    Formula: U S V^T = [D_1 ... D_E], B = c U_R, A_i = U_R^T D_i / c. c does not change B A_i; with it ||B||_F is the
    root mean square of the ||A_i||_F, so that training can go on with both at one scale.

    An adapter that does not have the module is None and counts as D_i = 0. `shape` is that of the result; columns
    beyond the sum of all ranks are zero.

    Source: Eckart & Young 1936; the asymmetry of A and B: Ban & Ji 2025, ALoRA.
    """
    frames, parts = {}, {}
    for i, found in enumerate(factors):
        if found is not None:
            frames[i], r = torch.linalg.qr(found.a.double().T)  # [K, m], [m, r]
            parts[i] = found.s * found.b.double() @ r.T  # [N, m], m = min(r, K)
    u, sigma, _ = torch.linalg.svd(torch.cat(list(parts.values()), 1), full_matrices=False)
    kept = min(shape.r, u.shape[1])
    basis, power = u[:, :kept], float(sigma[:kept].square().sum())
    c = (power / len(factors) / kept) ** 0.25 or 1.0
    b = torch.zeros(shape.n, shape.r, dtype=torch.float64)
    a = torch.zeros(len(factors), shape.r, shape.k, dtype=torch.float64)
    b[:, :kept] = c * basis
    norms, lost = [0.0] * len(factors), [0.0] * len(factors)
    for i, part in parts.items():
        inside = basis.T @ part
        a[i, :kept] = inside @ frames[i].T / c
        norms[i] = float(torch.linalg.norm(part))
        lost[i] = float(torch.linalg.norm(part - basis @ inside))
    return SharedB(b, a, sigma, norms, lost)


def rank_for(goal: float, spectra: Sequence[Tensor]) -> int:
    """The smallest R, the same in every module, whose error over everything is at most `goal`."""
    longest = max(len(sigma) for sigma in spectra)
    squares = torch.zeros(longest + 1, dtype=torch.float64)
    for sigma in spectra:
        squares[: len(sigma)] += sigma.square()
    left = squares.flip(0).cumsum(0).flip(0)  # [R]: what the values from R on amount to
    return max(1, int((left > goal**2 * left[0]).sum()))


@dataclass(frozen=True)
class ImportReport:
    """What one B for all costs. Errors are ||D_i - B A_i||_F / ||D_i||_F, before rounding to the file's dtype."""

    base: str | None  # the model's name
    folder: Path  # of the new adapter, as are R and the size of the weights
    rank: int
    bytes: int
    bytes_before: int  # of the originals together
    ranks: dict[str, int]  # task -> largest rank of the original
    norms: Errors  # ||D_i||_F
    lost: Errors  # ||D_i - B A_i||_F
    needed: dict[float, int]  # error over everything -> the smallest R that reaches it
    missing: dict[str, tuple[str, ...]]  # task -> modules that its adapter does not have; they stay as the base

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order of the rows of A."""
        return tuple(self.ranks)

    @property
    def error(self) -> float:
        """Over all tasks and modules."""
        return _ratio(chain(*self.lost.values()), chain(*self.norms.values()))

    def task_error(self, task: str) -> float:
        """Over all modules of one task."""
        i = self.tasks.index(task)
        return _ratio([row[i] for row in self.lost.values()], [row[i] for row in self.norms.values()])

    def module_error(self, module: str) -> float:
        """Over all tasks of one module."""
        return _ratio(self.lost[module], self.norms[module])

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """(module, error) of the modules that lose most."""
        return sorted(((m, self.module_error(m)) for m in self.lost), key=lambda row: -row[1])[:count]

    def table(self) -> list[tuple[str, int, float]]:
        """(task, original rank, error) of each task."""
        return [(task, rank, self.task_error(task)) for task, rank in self.ranks.items()]

    def save(self, path: str | Path) -> None:
        """Write module, task, ||D_i||_F and the relative error of each as CSV."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["module", "task", "norm", "relative_error"])
            for module, norms in self.norms.items():
                for task, norm, lost in zip(self.tasks, norms, self.lost[module], strict=True):
                    rows.writerow([module, task, norm, _ratio([lost], [norm])])


def _ratio(part: Iterable[float], whole: Iterable[float]) -> float:
    """||part|| / ||whole||; nothing of nothing is 0."""
    total = math.hypot(*whole)
    return math.hypot(*part) / total if total else 0.0


def import_lora(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    rank: int | None = None,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ImportReport:
    """Write several stock LoRA adapters as one ALoRA adapter with the best shared B; gives what that loses.

    Formula: minimise sum_i ||D_i - B A_i||_F^2 over B `[N, R]` and A_i, module by module; s = 1. See `shared_b`.

    Args:
        folders: stock PEFT LoRA adapters on one base. Adapters of one ALoRA (`export_lora`) come back exactly.
        out: folder of the new adapter.
        rank: R; None is the largest rank of the originals. The sum of their ranks loses nothing.
        names: of the tasks; None takes the folders' names.
        overwrite: replace an adapter in `out`.
        dtype: of the file.

    Raises:
        ValueError: an adapter that is not plain LoRA, that is damaged or changes nothing; other bases, task types or
            shapes; names that repeat. Nothing is written then.

    Example:
        >>> import_lora(["loras/movie", "loras/trec"], "both").error

    Source: Eckart & Young 1936; Ban & Ji 2025, ALoRA.
    """
    tasks = _task_names(folders, names)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    target = Path(out).resolve()
    check_replaceable(target, overwrite)
    adapters = dict(zip(tasks, [read_adapter(folder, only="lora") for folder in folders], strict=True))
    for adapter in adapters.values():
        adapter.say_copies()
    config, shapes = one_adapter(adapters, rank or max(adapter.rank for adapter in adapters.values()))
    tensors, report = over_best_b(adapters, shapes, target, dtype)
    cards = [read_task_cards(adapter.folder, [task]) for task, adapter in adapters.items()]
    made = f"\nMade from {len(tasks)} stock LoRA adapters: the best shared B of this rank in the Frobenius norm changes"
    made += f" the weights otherwise than they did by {100 * report.error:.2f} %, over all tasks and modules.\n"
    write_adapter(target, tensors, config, model_card(config, more=made))
    write_task_cards(target, {task: card for found in cards for task, card in found.items()})
    return report


def _task_names(folders: Sequence[str | Path], names: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(folders, str | Path) or not folders:
        raise ValueError(f"folders must be a list of at least one adapter folder, got {folders!r}")
    if names is not None and len(names) != len(folders):
        raise ValueError(f"{len(names)} names for {len(folders)} folders: give each folder one, in order")
    given = [Path(folder).resolve().name for folder in folders] if names is None else list(names)
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise ValueError(f"two tasks would be called {', '.join(twice)}: give names (--name, one per folder, in order)")
    return task_names(given)


def one_adapter(adapters: Mapping[str, AdapterFile], r: int) -> tuple[ALoRAConfig, dict[str, Shape]]:
    """Config of rank r and shapes of an adapter of several; those that name no base or task type are taken to fit."""
    _check_names(adapters)
    base, revision, task_type = (
        {task: getattr(adapter.config, key) for task, adapter in adapters.items()}
        for key in ("base", "revision", "task_type")
    )
    remedy = "If these are one model under several names, make base_model_name_or_path equal in their"
    settings: Any = {
        "base_model_name_or_path": _common(base, "on", "for different base models", f"{remedy} {CONFIG}"),
        "revision": _common(revision, "on", "for different revisions of the base", "Train one of them on the other's"),
        "task_type": _common(task_type, "is", "of different task types", "Import them separately"),
    }
    config = ALoRAConfig(r=r, lora_alpha=r, tasks=list(adapters), inference_mode=True, **settings)
    shapes = _common_shapes(adapters, r)
    # set now: the config itself would make it a set, in no fixed order
    config.target_modules = target_names([adapter.config for adapter in adapters.values()], shapes)
    return config, shapes


def _common(said: Mapping[str, str | None], verb: str, what: str, remedy: str) -> str | None:
    """What all tasks say that say anything."""
    tasks = {value: task for task, value in said.items() if value}
    if len(tasks) > 1:
        listed = ", ".join(f"{task} {verb} {value}" for value, task in tasks.items())
        raise ValueError(f"the adapters are {what}: {listed}. {remedy}")
    return next(iter(tasks), None)


def _common_shapes(adapters: Mapping[str, AdapterFile], r: int) -> dict[str, Shape]:
    """Every module of any adapter, with the new rank."""
    owners: dict[str, tuple[str, Shape]] = {}
    for task, adapter in adapters.items():
        for module, shape in adapter.shapes.items():
            first, known = owners.setdefault(module, (task, shape))
            if (known.n, known.k) != (shape.n, shape.k):
                raise ValueError(
                    f"{module} is {known.n} x {known.k} in {first} but {shape.n} x {shape.k} in {task}: these adapters"
                    " are for different models"
                )
    return {module: Shape(shape.n, r, shape.k) for module, (_, shape) in sorted(owners.items())}


def _check_names(adapters: Mapping[str, AdapterFile]) -> None:
    """Refuse a module that one adapter has under another's name with something before it: no B would be shared."""
    owners = {module: task for task, adapter in adapters.items() for module in adapter.shapes}
    for module, task in owners.items():
        parts = module.split(".")
        for shorter in (".".join(parts[i:]) for i in range(1, len(parts) - 1)):
            other = owners.get(shorter)
            if other is not None and not adapters[task].shapes.keys() & adapters[other].shapes.keys():
                raise ValueError(
                    f"{task} adapts {module} and {other} adapts {shorter}, and they have no module in common: they were"
                    " saved from models of other classes; save them from the same one"
                )


def over_best_b(
    adapters: Mapping[str, AdapterFile], shapes: Mapping[str, Shape], folder: Path, dtype: torch.dtype
) -> tuple[dict[str, Tensor], ImportReport]:
    """The tensors of an adapter with the best shared B, by their names in its file, and what that loses."""
    tensors: dict[str, Tensor] = {}
    norms, lost, spectra = {}, {}, []
    for module, shape in shapes.items():
        found = shared_b([a.factors(module) if module in a.shapes else None for a in adapters.values()], shape)
        a, b = found.a.to(dtype), found.b.to(dtype)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"numbers too large for {dtype}: use float32")
        tensors |= {f"{PREFIX}{module}.asymlora_A.weight": a, f"{PREFIX}{module}.asymlora_B.weight": b}
        norms[module], lost[module] = found.norms, found.lost
        spectra.append(found.sigma)
    for i, (task, adapter) in enumerate(adapters.items()):
        if not any(row[i] for row in norms.values()):
            raise ValueError(f"adapter {task} ({adapter.folder}) changes nothing: its B A is zero everywhere, as of an"
                             " adapter that was never trained; leave it out")  # fmt: skip
    needed = {goal: rank_for(goal, spectra) for goal in GOALS}
    return tensors, report_of(adapters, shapes, tensors, folder, norms, lost, needed)


def report_of(
    adapters: Mapping[str, AdapterFile],
    shapes: Mapping[str, Shape],
    tensors: Mapping[str, Tensor],
    folder: Path,
    norms: Mapping[str, list[float]] = {},
    lost: Mapping[str, list[float]] = {},
    needed: Mapping[float, int] = {},
) -> ImportReport:
    """The report of an adapter that is about to be written; one that loses nothing needs no errors."""
    files = {adapter.folder: adapter for adapter in adapters.values()}
    return ImportReport(
        base=next(filter(None, (adapter.base for adapter in adapters.values())), None),
        folder=folder,
        rank=next(iter(shapes.values())).r,
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        bytes_before=sum(file.stamp.bytes for file in files.values()),
        ranks={task: adapter.rank for task, adapter in adapters.items()},
        norms=dict(norms),
        lost=dict(lost),
        needed=dict(needed),
        missing={t: gap for t, a in adapters.items() if (gap := tuple(m for m in shapes if m not in a.shapes))},
    )
