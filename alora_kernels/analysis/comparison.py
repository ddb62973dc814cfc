"""Compare adapters, tasks or clients with each other, with their start and with the base.

`Unit`s become one `Analysis`: rows of similarity, change and size, and a reason for everything that was left out. Works
module by module: in memory are the matrices of one module of all units, and the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.config import refused
from .change import Change, column_change, merged_change, update_spectrum
from .gradients import conflict_files
from .similarity import chance, cosine, cosines, double, overlaps, subspace_overlap
from .sources import HYDRA, SOFT, Loaded, Unit, units
from .table import Analysis, Described, Place, Row, Skipped, distinct, places

#: which side of a part spans the space that units share: A reads from K inputs, B writes to N outputs, M and B1 meet
#: in the d_m dimensions that clients of unequal rank have in common
TRANSPOSED = {"A": False, "B": True, "M": True, "B1": False, "B2": True}
ZERO, START, W0 = "zero", "start", "W0"  # what a change is measured from
BEGINS_AT_ZERO = ("B", "B2", "lambda_b")
SAME = "one matrix: the units of this folder share it"
NO_DIRECTION = "all zeros: it has no direction"
NO_SCALE = "the folder does not say s"


def compare_units(
    units: Sequence[Unit],
    init: Sequence[Unit] | str | Path | None = None,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Compare units with each other, and each with its start and with the base.

    Args:
        units: of one or several folders, see `units`.
        init: what they were trained from: units, or a folder of them. Each is measured against the one of its name,
            or against the only one. None: B (and VeRA's lambda_b) began at zero, of other parts no change is known.
        base: the base model, or module -> W0 `[N, K]`, for the change from W0 to W0 + s B A.
        progress: called with (modules done, modules) after each module.

    Raises:
        ValueError: no unit; the same one twice; no start or no weight fits any of them.
    """
    _check_different(units)
    named = list(zip(distinct([unit.names for unit in units]), units, _starts(units, init), strict=True))
    at = places({module for unit in units for module in unit.shapes})
    weights = None if base is None else _weights(base, at)
    study = Analysis([Described(label, u.kind, len(u.shapes), u.rank, u.base, u.folder) for label, u, _ in named], at)
    left: dict[tuple[str, str, str, str, str], list[str]] = {}
    with _one_thread():
        for done, (module, place) in enumerate(at.items(), 1):
            here = _Module(study, left, module, place, init is not None)
            sides = [_side(label, unit, start, module) for label, unit, start in named if module in unit.shapes]
            weight = None if weights is None else weights.get(module)
            here.measure(sides, weight)
            absent = [label for label, unit, _ in named if unit.shapes and module not in unit.shapes]
            for one in sides:
                for two in absent:
                    here.skip(one.label, two, "all", "all", f"{two} has no adapter there")
            for side in sides if weights is not None and weight is None else ():
                here.skip(side.label, W0, "W", "change", "the base has no such module")
            if progress is not None:
                progress(done, len(at))
    study.skipped = [Skipped(*reason, tuple(modules)) for reason, modules in left.items()]
    study.skipped += [Skipped(label, "", "all", "all", unit.why, ()) for label, unit, _ in named if unit.why]
    study.notes = _notes(study, units, init is not None, base is not None)
    folders = dict.fromkeys(unit.folder for unit in units)
    study.conflicts = [file for folder in folders for file in conflict_files(folder)]
    return study


@contextmanager
def _one_thread() -> Iterator[None]:
    """Decompositions of [8, 576] are too small to share: two busy cores took 86 s for what one thread did in 2 s."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_different(given: Sequence[Unit]) -> None:
    if not given:
        raise ValueError("units is empty: give at least one")
    seen: set[Any] = set()
    for unit in given:
        key = unit.folder.resolve(), unit.names[:1]
        if key in seen:
            raise ValueError(f"{unit.folder} is given twice: give each folder once")
        seen.add(key)


def _starts(checked: Sequence[Unit], init: Sequence[Unit] | str | Path | None) -> list[Unit | None]:
    """The start of each unit."""
    if init is None:
        return [None] * len(checked)
    given = units(init) if isinstance(init, str | Path) else list(init)
    by_name = {unit.name: unit for unit in given}
    starts = [given[0] if len(given) == 1 else by_name.get(unit.name) for unit in checked]
    if not any(start and start.shapes.keys() & unit.shapes.keys() for start, unit in zip(starts, checked, strict=True)):
        names = ", ".join(sorted(by_name)[:5])
        raise refused(
            given[0].folder if given else "init", f"is the start of none of the units: it has {names or 'nothing'}, and"
            f" they are {', '.join(sorted({unit.name for unit in checked})[:5])}, at other modules or by other names"
        )  # fmt: skip
    return starts


def _weights(base: nn.Module | Mapping[str, Tensor], at: Mapping[str, Place]) -> Mapping[str, Tensor]:
    """module -> W0, of those that the base has."""
    if isinstance(base, nn.Module):
        layers: dict[str, Any] = {n: m for n, m in base.named_modules(remove_duplicate=False) if n in at}
        base = {
            # GPT-2's is [K, N]
            name: layer.weight.detach().T if type(layer).__name__ == "Conv1D" else layer.weight.detach()
            for name, layer in layers.items()
            if isinstance(getattr(layer, "weight", None), Tensor)
        }
    if all(base.get(module) is None for module in at):
        raise ValueError(f"base has none of the adapted modules, such as {next(iter(at), 'any')}: is it the model they"
                         " were trained on?")  # fmt: skip
    return base


class _Side(NamedTuple):
    """One unit's share in a module: its matrices, its start if known, and the folder of each part that it shares."""

    label: str
    now: Loaded
    start: Loaded | None
    shared: dict[str, Path]


def _side(label: str, unit: Unit, start: Unit | None, module: str) -> _Side:
    before = start.read(module) if start is not None and module in start.shapes else None
    return _Side(label, unit.read(module), before, dict.fromkeys(unit.shared, unit.folder))


@dataclass
class _Module:
    """One module of all units that have it; what is measured goes into `study`, the reasons of the rest into `left`."""

    study: Analysis
    left: dict[tuple[str, str, str, str, str], list[str]]
    module: str
    place: Place
    known_start: bool

    def add(
        self, to: list[Row], unit1: str, unit2: str, part: str, measure: str, value: Any, level: float | None = None
    ) -> None:
        to.append(Row(self.module, *self.place, part, unit1, unit2, measure, float(value), level))

    def skip(self, unit1: str, unit2: str, part: str, measure: str, reason: str) -> None:
        self.left.setdefault((unit1, unit2, part, measure, reason), []).append(self.module)

    def measure(self, sides: Sequence[_Side], weight: Tensor | None) -> None:
        """Everything, with W0 `[N, K]` if the base is known and has it."""
        for part in dict.fromkeys(part for side in sides for part in side.now.parts):
            having = [side for side in sides if part in side.now.parts]
            self._compare(part, having)
            for side in having:
                norm = torch.linalg.vector_norm(double(side.now.parts[part]))
                self.add(self.study.norms, side.label, "", part, "frobenius", norm)
                self._change(part, side)
        for side in sides:
            self._update(side, weight)
        for one, two in combinations(sides, 2):
            if not one.now.parts.keys() & two.now.parts.keys():
                parts = " and ".join(", ".join(side.now.parts) for side in (one, two))
                self.skip(one.label, two.label, "all", "all", f"no part in common: {parts}")

    def _compare(self, part: str, sides: Sequence[_Side]) -> None:
        """Every pair of one part, once."""
        if len(sides) < 2:
            return
        owners = {side.shared.get(part) for side in sides}
        if len(owners) == 1 and None not in owners:  # no decompositions for what is skipped anyway
            for one, two in combinations(sides, 2):
                self.skip(one.label, two.label, part, "all", SAME)
            return
        tensors = [side.now.parts[part] for side in sides]
        zero = [not bool(t.any()) for t in tensors]
        alike, spaces = cosines(tensors), part in TRANSPOSED
        overlap, level = overlaps([t.T if TRANSPOSED[part] else t for t in tensors]) if spaces else (alike, alike)
        for (i, one), (j, two) in combinations(enumerate(sides), 2):
            names = one.label, two.label
            shapes = f"{list(tensors[i].shape)} and {list(tensors[j].shape)}"
            if part in one.shared and one.shared[part] == two.shared.get(part):
                self.skip(*names, part, "all", SAME)
                continue
            if zero[i] or zero[j]:
                self.skip(*names, part, "all", NO_DIRECTION)
                continue
            if tensors[i].shape == tensors[j].shape:
                self.add(self.study.similarity, *names, part, "cosine", alike[i, j])
            else:
                self.skip(*names, part, "cosine", f"needs one shape: {shapes}")
            if not spaces:
                self.skip(*names, part, "overlap", "a vector has no subspace")
            elif overlap[i, j].isfinite():
                self.add(self.study.similarity, *names, part, "overlap", overlap[i, j], float(level[i, j]))
            else:
                ends = "outputs" if TRANSPOSED[part] else "inputs"
                self.skip(*names, part, "overlap", f"needs one number of {ends}: {shapes}")

    def _change(self, part: str, side: _Side) -> None:
        """Length and direction of the columns against the start; without one, B's lengths against zero."""
        after = side.now.parts[part]
        if not self.known_start:
            if part in BEGINS_AT_ZERO:
                change = column_change(_columns(torch.zeros_like(after)), _columns(after))
                self._add_change(side.label, ZERO, part, change)
            return
        start = None if side.start is None else side.start.parts.get(part)
        if start is None or start.shape != after.shape:
            shapes = "it is not there" if start is None else f"shape {list(start.shape)}, not {list(after.shape)}"
            self.skip(side.label, START, part, "change", f"the start does not fit: {shapes}")
            return
        before, after = _columns(start), _columns(after)
        self._add_change(side.label, START, part, column_change(before, after))
        p, q = (t.T if TRANSPOSED.get(part) else t for t in (before, after))
        self.add(self.study.changes, side.label, START, part, "cosine", cosine(p, q))
        if part in TRANSPOSED:
            level = chance(p.shape[0], q.shape[0], p.shape[1])
            self.add(self.study.changes, side.label, START, part, "overlap", subspace_overlap(p, q), level)

    def _add_change(self, label: str, origin: str, part: str, change: Change) -> None:
        for name in ("magnitude", "relative_magnitude", "direction"):
            self.add(self.study.changes, label, origin, part, name, getattr(change, name))
        self.add(self.study.changes, label, origin, part, "columns_without_direction", change.without_direction)

    def _update(self, side: _Side, weight: Tensor | None) -> None:
        """Singular values of s B A, and W0 against W0 + s B A."""
        update, label = side.now.update, side.label
        if update is None:
            self.skip(label, "", "sBA", "effective_rank", "needs VeRA's frozen projections, not read")
            return
        spectrum = update_spectrum(update.a, update.b, 1.0 if update.s is None else update.s)
        for measure in ("effective_rank", "stable_rank", *(() if update.s is None else ("frobenius",))):
            self.add(self.study.norms, label, "", "sBA", measure, getattr(spectrum, measure))
        if update.s is None:
            self.skip(label, "", "sBA", "frobenius", NO_SCALE)
        if weight is None:
            return
        wanted = (update.b.shape[0], update.a.shape[1])
        if update.s is None:
            self.skip(label, W0, "W", "change", NO_SCALE)
        elif tuple(weight.shape) != wanted or not weight.is_floating_point():
            shown = f"{list(weight.shape)} of {weight.dtype}, not {list(wanted)} of a floating dtype"
            self.skip(label, W0, "W", "change", f"the base's weight is {shown}")
        else:
            self._add_change(label, W0, "W", merged_change(weight, update.a, update.b, update.s))


def _columns(tensor: Tensor) -> Tensor:
    """A vector as one column: its length and its direction are what can change."""
    return tensor if tensor.dim() == 2 else tensor[:, None]


def _notes(study: Analysis, given: Sequence[Unit], start: bool, base: bool) -> list[str]:
    """What a reader must know before the numbers."""
    able = [unit for unit in given if unit.shapes]
    bases = sorted({unit.base for unit in given if unit.base})
    kinds = dict.fromkeys(unit.kind for unit in able)
    first_parts = [frozenset(next(iter(unit.shapes.values()))) for unit in able]
    shared = frozenset[str]().union(*(unit.shared for unit in able))
    owner_of_b = "Tasks of one ALoRA folder"
    if SOFT in kinds:
        owner_of_b = "Experts of one soft ALoRA folder" if len(kinds) == 1 else "Tasks or experts of one ALoRA folder"
    notes = {
        "There is one unit, so nothing to compare it with: below are its changes, ranks and norms.": len(able) < 2,
        "Two units make one pair: there is no spread over pairs; ± is the spread over modules.": len(able) == 2,
        f"The units name different bases ({', '.join(bases)}). Unless these are names of one model, similarity between"
        " them says nothing: equal numbers mean different things in different networks.": len(bases) > 1,
        f"Units of different kinds ({', '.join(kinds)}): only parts of the same name are compared.":
            len(set(first_parts)) > 1,
        "VeRA trains two vectors per module, lambda_d and lambda_b: they have cosines but no subspaces.":
            "VeRA" in kinds,
        "Clients of unequal rank: compared are each client's own A, M, B1 and B2, and the merged B they share. B2 goes"
        " into B after every round and is zero at the end of a run.": any("M" in parts for parts in first_parts),
        f"{owner_of_b} share one B: it is not compared with itself.": "B" in shared,
        "Experts of one HydraLoRA folder share one A: it is not compared with itself.": "A" in shared,
        "s B A of an expert is the change that its router would make by giving it all the weight.":
            SOFT in kinds or HYDRA in kinds,
        "No start was given (--init): the change of B is measured from zero, where LoRA and ALoRA begin it; of A it is"
        " not known.": not start,
        "No base was given (--base): the change from W0 to W0 + s B A is not measured.": not base,
        "Module names hold no layer number: there are no curves over the layers.":
            all(place.layer is None for place in study.places.values()),
    }  # fmt: skip
    return [note for note, applies in notes.items() if applies]
