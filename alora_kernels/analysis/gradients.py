"""Do tasks pull an adapter's matrices in opposite directions? A `Conflicts` per matrix says.

For users at any point of a training and for `ConflictCallback`, whose CSV files are read here again for reports.

Two tasks conflict in a matrix where the cosine of their gradients is negative: a step for one undoes the other. Only
what tasks share can conflict: under task routing A [E, R, K] is one slice per task, so those gradients never meet and
count as no pair. The model is measured in eval mode (dropout would add noise of its own) and left as found.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..text import listed
from .similarity import double, unit_vector

Loss = Callable[[nn.Module, Any], Tensor]

MAX_ROWS = 1_000_000  # of a CSV: 210 modules, A and B, 2000 measurements
_NAME = re.compile(r"^(?:(.+?)\.)?(?:(?:asymlora|lora)_([AB])|vera_(lambda_[a-z]+))(?:\.(.+?))??(?:\.weight)?$")


class NotFiniteError(ValueError):
    """Gradients with NaN or infinity; the matrices are named."""


@dataclass(frozen=True, eq=False)
class Conflicts:
    """The gradients of several tasks for one matrix."""

    module: str  # path of the layer
    parameter: str  # "A", "B"; "lambda_b", "lambda_d" of VeRA
    shared: bool  # False where no two tasks can meet: A under task routing
    tasks: tuple[str, ...]
    norms: tuple[float, ...]  # Frobenius norm of each task's gradient
    cosine: Tensor  # `[T, T]` float64 on the CPU; nan where two cannot be compared (a gradient of zero, other slices)
    pairs: int  # of different tasks that were compared
    conflicts: int  # those with a negative cosine (Yu et al. 2020, definition 1)

    @property
    def norm(self) -> float:
        """Mean norm over tasks."""
        return sum(self.norms) / len(self.norms)

    @property
    def sharing(self) -> str:
        """`shared` in words."""
        return "shared" if self.shared else "per task"


def compare(
    gradients: Mapping[str, Tensor], *, module: str = "", parameter: str = "", routed: bool = False
) -> Conflicts:
    """Norms, cosines and conflicts of the gradients of one matrix.

    Args:
        gradients: of two tasks at least, all of one shape; a NotFiniteError names matrix and tasks for NaN or infinity.
        module, parameter: its name, for the record and for errors.
        routed: the first dimension counts slices, each the own of some tasks: two tasks are compared only if their
            gradients reach a common slice (several data sets may train one task of the model).
    """
    tasks = two_tasks(gradients)
    if len({gradient.shape for gradient in gradients.values()}) > 1:
        shapes = {task: list(gradient.shape) for task, gradient in gradients.items()}
        raise ValueError(f"gradients must have one shape, got {shapes}")
    stacked = torch.stack([double(gradient).cpu() for gradient in gradients.values()])
    rows = stacked.flatten(1)
    bad = [task for task, row in zip(tasks, rows, strict=True) if not bool(row.isfinite().all())]
    if bad:
        raise NotFiniteError(f"gradient of {module or 'the matrix'} {parameter}".rstrip() + f" not finite: {bad}")
    directions = torch.stack([unit_vector(row) for row in rows])
    cosine = (directions @ directions.T).clamp(-1.0, 1.0)
    if routed:
        reached = (stacked != 0).reshape(len(tasks), stacked.shape[1], -1).any(2).double()  # [T, E]
        cosine[(reached @ reached.T) == 0] = float("nan")
    above = cosine[tuple(torch.triu_indices(len(tasks), len(tasks), 1))]
    pairs = int(above.isfinite().sum())
    norms = tuple(torch.linalg.vector_norm(rows, dim=1).tolist())
    return Conflicts(module, parameter, not routed or pairs > 0, tasks, norms, cosine, pairs, int((above < 0).sum()))


def two_tasks(by_task: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the tasks. Raises ValueError for fewer than two."""
    if len(by_task) < 2:
        found = ", ".join(map(str, by_task)) or "none"
        raise ValueError(f"conflicts are between tasks: give batches or gradients of at least two, got {found}")
    return tuple(by_task)


def task_gradients(
    model: nn.Module, batches: Mapping[str, Any], loss: Loss, parameters: Sequence[str] | None = None
) -> dict[str, dict[str, Tensor]]:
    """The gradient of each task's loss by one forward and backward: parameter -> task -> gradient in its dtype.

    The model's `.grad`, training modes and the random states of torch, numpy and Python are left as found, also after
    an error. Costs T times the memory of the parameters. Sharded models (FSDP, ZeRO-3) are not supported.

    Args:
        batches: task -> batch; tensors of a mapping are moved to the model's device, the mapping is copied.
        loss: `(model, batch) -> scalar`, e.g. `trainer.compute_loss`; sets the routing if the model needs one.
            Gradients
            of what it does not depend on are zeros.
        parameters: names as in `model.named_parameters()`. Default: every trainable A, B and VeRA vector.

    Raises:
        NotFiniteError: NaN or infinity; tasks and modules are named.
        ValueError: no batch, unknown or frozen parameters, a loss that is not a scalar tensor.
    """
    if not batches:
        raise ValueError("batches is empty: give one batch per task")
    chosen = _chosen(model, parameters)
    device = next(iter(chosen.values())).device
    out: dict[str, dict[str, Tensor]] = {name: {} for name in chosen}
    with _as_found(model):
        for task, batch in batches.items():
            if isinstance(batch, Mapping):
                batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.dim() > 0:
                shown = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss must return a scalar tensor; for task {task!r} it returned {shown}")
            if value.requires_grad:  # torch.autograd.grad, not backward: nothing is added to .grad, no hook of DDP runs
                found = torch.autograd.grad(value, list(chosen.values()), allow_unused=True, materialize_grads=True)
            else:
                found = tuple(torch.zeros_like(p) for p in chosen.values())
            for by_task, gradient in zip(out.values(), found, strict=True):
                by_task[task] = gradient.detach()
    bad = [f"{n} ({t})" for n, by_task in out.items() for t, g in by_task.items() if not bool(g.isfinite().all())]
    if bad:
        raise NotFiniteError(f"gradients with NaN or infinity: {listed(bad, 5)}")
    return out


def task_conflicts(
    model: nn.Module, batches: Mapping[str, Any], loss: Loss, parameters: Sequence[str] | None = None
) -> list[Conflicts]:
    """`compare` for every matrix of `task_gradients`, in the order of the model; arguments and errors as there."""
    two_tasks(batches)
    gradients = task_gradients(model, batches, loss, parameters)
    names = {name for name, _ in model.named_parameters()}
    records: dict[tuple[str, str], Conflicts] = {}
    for name, by_task in gradients.items():
        module, parameter, adapter = _place(name)
        if (module, parameter) in records:
            raise ValueError(f"{module} has several trainable adapters: choose those of one with parameters=[...]")
        routers = (f"asymlora_router.{adapter}.weight", "router", "router.weight")
        soft = names & {f"{module}.{router}".lstrip(".") for router in routers}
        stack = next(iter(by_task.values())).shape
        routed = len(stack) > 2 and stack[0] > 1 and not soft and ".asymlora_B." not in name  # whose stack is experts
        records[module, parameter] = compare(by_task, module=module, parameter=parameter, routed=routed)
    return list(records.values())


def probe_batches(rows: Any, collate: Callable[[list[Any]], Any], size: int = 8) -> dict[str, Any]:
    """One batch per task from a data set: its first `size` rows, or all it has, the same ones in every run.

    Args:
        rows: a `datasets.Dataset` or a sequence of mappings, with a column `task`; a ValueError without it.
        collate: rows -> batch, e.g. `trainer.data_collator`.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    columns = getattr(rows, "column_names", None)
    if "task" not in (columns if columns is not None else (rows[0] if len(rows) else ())):
        raise ValueError("rows need a column `task`")
    places: dict[str, list[int]] = {}
    for i, task in enumerate(rows["task"] if columns is not None else [row["task"] for row in rows]):
        places.setdefault(str(task), []).append(i)
    return {task: collate([rows[i] for i in found[:size]]) for task, found in places.items()}


def _place(name: str) -> tuple[str, str, str]:
    """Module, matrix and adapter of a parameter's name; a name of another kind is its own module."""
    match = _NAME.match(name)
    if match is None:
        return *name.rpartition(".")[::2], ""
    module, matrix, vector, adapter = match.groups(default="")
    return module, matrix or vector, adapter


def _chosen(model: nn.Module, parameters: Sequence[str] | None) -> dict[str, nn.Parameter]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters is None:
        parameters = list(filter(_NAME.match, trainable))
        if not parameters:
            raise ValueError("model has no trainable asymlora_A/B, lora_A/B or vera_lambda_*: name some in parameters")
    wrong = [name for name in parameters if name not in trainable]
    if wrong or not parameters:
        raise ValueError(f"parameters must name trainable parameters of the model, got {wrong or 'none'}")
    return {name: trainable[name] for name in parameters}


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Eval mode and gradients on; afterwards every module's mode and all random states are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for module, _ in modes:
                module.training = False  # the flag alone: some modules' own train() and eval() do more
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy)


class Measured(NamedTuple):
    """A row of a file: a matrix at a step. `conflicts` of `pairs` pairs of tasks had gradients of negative cosine."""

    step: int
    module: str
    parameter: str
    sharing: str
    norm: float
    conflicts: int
    pairs: int


COLUMNS = Measured._fields  # of the CSV that the callback writes; here, because readers of it need no transformers


def share_of(rows: Sequence[Measured]) -> float:
    """Conflicting pairs over pairs; NaN without pairs."""
    pairs = sum(row.pairs for row in rows)
    return sum(row.conflicts for row in rows) / pairs if pairs else float("nan")


class ConflictFile(NamedTuple):
    """One file; `why` says why it could not be read."""

    path: Path
    rows: list[Measured]
    why: str = ""


def conflict_files(folder: Path) -> list[ConflictFile]:
    """The files in a folder with the callback's header; of a folder called `adapter` those beside it as well."""
    folders = [folder, folder.parent] if folder.name == "adapter" else [folder]
    return [read for place in folders for path in sorted(place.glob("*.csv")) if (read := _read(path)) is not None]


def _read(path: Path) -> ConflictFile | None:
    """None of a file that is something else."""
    ours = False
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            ours = tuple(next(lines, ())) == COLUMNS
            rows = [_measured(row) for row in itertools.islice(lines, MAX_ROWS - 1)] if ours else []
    except (OSError, ValueError, csv.Error) as error:
        return ConflictFile(path, [], f"{path} does not read as gradient conflicts ({error})") if ours else None
    if not ours:
        return None
    return ConflictFile(path, rows, "" if rows else f"{path} has no row: nothing was measured yet")


def _measured(row: list[str]) -> Measured:
    step, module, parameter, sharing, norm, conflicts, pairs = row
    return Measured(int(step), module, parameter, sharing, float(norm), int(conflicts), int(pairs))
