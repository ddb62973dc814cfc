"""Compare adapters, tasks or clients with each other, with their start and with the base.

`Unit`s become one `Analysis`: rows of similarity, change and size, and a reason for everything that was left out. Works
module by module: in memory are the matrices of one module of all units, and the rows. The formulas are those of
`similarity` and `change`, but each basis is computed once, not once per pair (16 tasks: 16 decompositions, not 240).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.config import refused
from .change import Change, column_change, merged_change, update_spectrum
from .float64 import double
from .gradients import conflict_files
from .labels import Place, distinct, places
from .similarity import chance, cosine, row_basis, subspace_overlap, unit_vector
from .sources import HYDRA, SOFT, Loaded, Unit, units
from .table import Analysis, Described, Row, Skipped

#: which side of a part spans the space that units share: A reads from K inputs, B writes to N outputs, M and B1 meet
#: in the d_m dimensions that clients of unequal rank have in common
TRANSPOSED = {"A": False, "B": True, "M": True, "B1": False, "B2": True}
ZERO, START, W0 = "zero", "start", "W0"  # what a change is measured from
BEGINS_AT_ZERO = ("B", "B2", "lambda_b")
SAME = "one matrix: the units of this folder share it"
NO_DIRECTION = "all zeros: it has no direction"


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

    Returns:
        Rows, reasons, notes.

    Raises:
        ValueError: no unit; the same one twice; no start or no weight fits any of them.
    """
    _check_different(units)
    labels = distinct([unit.names for unit in units])
    named = list(zip(labels, units, strict=True))
    starts = _starts(units, init)
    at = places({module for unit in units for module in unit.shapes})
    weights = _weights(base, at) if base is not None else None
    described = [Described(label, u.kind, len(u.shapes), u.rank, u.base, u.folder) for label, u in named]
    study = Analysis(described, at)
    left: dict[tuple[str, str, str, str, str], list[str]] = {}
    with _one_thread():
        for done, (module, place) in enumerate(at.items(), 1):
            sides = [_side(unit, label, starts.get(id(unit)), module) for label, unit in named if module in unit.shapes]
            of_module = _Module(study, left, module, place, sides, init is not None)
            of_module.measure(None if weights is None else weights(module))
            absent = [label for label, unit in named if unit.shapes and module not in unit.shapes]
            for one in sides:
                for two in absent:
                    of_module.skip(one.label, two, "all", "all", f"{two} has no adapter there")
            if weights is not None and weights(module) is None:
                for side in sides:
                    of_module.skip(side.label, W0, "W", "change", "the base has no such module")
            if progress is not None:
                progress(done, len(at))
    study.skipped = [Skipped(*reason, tuple(modules)) for reason, modules in left.items()]
    study.skipped += [Skipped(label, "", "all", "all", unit.why, ()) for label, unit in named if unit.why]
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
    seen: set[tuple[Path, tuple[str, ...]]] = set()
    for unit in given:
        key = unit.folder.resolve(), unit.names[:1]
        if key in seen:
            raise ValueError(f"{unit.folder} is given twice: give each folder once")
        seen.add(key)


def _starts(checked: Sequence[Unit], init: Sequence[Unit] | str | Path | None) -> dict[int, Unit]:
    """id of a unit -> its start."""
    if init is None:
        return {}
    given = units(init) if isinstance(init, str | Path) else list(init)
    by_name = {unit.name: unit for unit in given}
    found = {}
    for unit in checked:
        start = given[0] if len(given) == 1 else by_name.get(unit.name)
        if start is not None:
            found[id(unit)] = start
    if not any(set(unit.shapes) & set(found[id(unit)].shapes) for unit in checked if id(unit) in found):
        names = ", ".join(sorted(by_name)[:5])
        raise refused(
            given[0].folder if given else "init", f"is the start of none of the units: it has {names or 'nothing'}, and"
            f" they are {', '.join(sorted({unit.name for unit in checked})[:5])}, at other modules or by other names"
        )  # fmt: skip
    return found


def _weights(base: nn.Module | Mapping[str, Tensor], at: Iterable[str]) -> Callable[[str], Tensor | None]:
    """module -> W0, None where the base has none."""

    def of_model(module: str) -> Tensor | None:
        try:
            layer: Any = base.get_submodule(module)  # type: ignore[union-attr]
        except AttributeError:
            return None
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            return None
        return weight.detach().T if type(layer).__name__ == "Conv1D" else weight.detach()  # GPT-2's is [K, N]

    get = base.get if isinstance(base, Mapping) else of_model
    modules = list(at)
    if all(get(module) is None for module in modules):
        raise ValueError(f"base has none of the adapted modules, such as {modules[0] if modules else 'any'}: is it the"
                         " model they were trained on?")  # fmt: skip
    return get


@dataclass
class _Side:
    """One unit's share in a module: its label, its matrices, its start if known, and what it shares with others."""

    label: str
    now: Loaded
    start: Loaded | None
    shared: dict[str, Any]


def _side(unit: Unit, label: str, start: Unit | None, module: str) -> _Side:
    before = start.read(module) if start is not None and module in start.shapes else None
    return _Side(label, unit.read(module), before, dict.fromkeys(unit.shared, unit.folder))


@dataclass
class _Module:
    """One module of all units that have it; what is measured goes into `study`, the reasons of the rest into `left`."""

    study: Analysis
    left: dict[tuple[str, str, str, str, str], list[str]]
    module: str
    place: Place
    sides: Sequence[_Side]
    known_start: bool

    def row(self, part: str, unit1: str, unit2: str, measure: str, value: Any, level: float | None = None) -> Row:
        return Row(self.module, *self.place, part, unit1, unit2, measure, float(value), level)

    def skip(self, unit1: str, unit2: str, part: str, measure: str, reason: str) -> None:
        self.left.setdefault((unit1, unit2, part, measure, reason), []).append(self.module)

    def measure(self, weight: Tensor | None) -> None:
        """Everything, with W0 `[N, K]` if the base is known and has it."""
        for part in dict.fromkeys(part for side in self.sides for part in side.now.parts):
            having = [side for side in self.sides if part in side.now.parts]
            self._compare(part, having)
            for side in having:
                norm = torch.linalg.vector_norm(double(side.now.parts[part]))
                self.study.norms.append(self.row(part, side.label, "", "frobenius", norm))
                self._change(part, side)
        for side in self.sides:
            self._update(side, weight)
        for one, two in combinations(self.sides, 2):
            if not one.now.parts.keys() & two.now.parts.keys():
                parts = " and ".join(", ".join(side.now.parts) for side in (one, two))
                self.skip(one.label, two.label, "all", "all", f"no part in common: {parts}")

    def _compare(self, part: str, sides: Sequence[_Side]) -> None:
        """Every pair of one part, once."""
        owners = {side.shared.get(part) for side in sides}
        if len(owners) == 1 and None not in owners:  # no decompositions for what is skipped anyway
            for one, two in combinations(sides, 2):
                self.skip(one.label, two.label, part, "all", SAME)
            return
        if len(sides) < 2:
            return
        tensors = [side.now.parts[part] for side in sides]
        alike, spaces = cosines(tensors), part in TRANSPOSED
        overlap, level = overlaps([t.T if TRANSPOSED[part] else t for t in tensors]) if spaces else (alike, alike)
        zero = [not bool(t.any()) for t in tensors]
        found = self.study.similarity
        for (i, one), (j, two) in combinations(enumerate(sides), 2):
            names = one.label, two.label
            if part in one.shared and one.shared[part] == two.shared.get(part):
                self.skip(*names, part, "all", SAME)
                continue
            if zero[i] or zero[j]:
                self.skip(*names, part, "all", NO_DIRECTION)
                continue
            shapes = f"{list(tensors[i].shape)} and {list(tensors[j].shape)}"
            if tensors[i].shape == tensors[j].shape:
                found.append(self.row(part, *names, "cosine", alike[i, j]))
            else:
                self.skip(*names, part, "cosine", f"needs one shape: {shapes}")
            if not spaces:
                self.skip(*names, part, "overlap", "a vector has no subspace")
            elif overlap[i, j].isfinite():
                found.append(self.row(part, *names, "overlap", overlap[i, j], float(level[i, j])))
            else:
                ends = "outputs" if TRANSPOSED[part] else "inputs"
                self.skip(*names, part, "overlap", f"needs one number of {ends}: {shapes}")

    def _change(self, part: str, side: _Side) -> None:
        """Length and direction of the columns against the start; without one, B's lengths against zero."""
        after = side.now.parts[part]
        if not self.known_start:
            if part in BEGINS_AT_ZERO:
                before = torch.zeros_like(after)
                self._add_change(part, side.label, ZERO, column_change(_columns(before), _columns(after)))
            return
        start = None if side.start is None else side.start.parts.get(part)
        if start is None or start.shape != after.shape:
            shapes = "it is not there" if start is None else f"shape {list(start.shape)}, not {list(after.shape)}"
            self.skip(side.label, START, part, "change", f"the start does not fit: {shapes}")
            return
        before, after = _columns(start), _columns(after)
        self._add_change(part, side.label, START, column_change(before, after))
        p, q = (t.T if TRANSPOSED.get(part) else t for t in (before, after))
        self.study.changes.append(self.row(part, side.label, START, "cosine", cosine(p, q)))
        if part in TRANSPOSED:
            level = chance(p.shape[0], q.shape[0], p.shape[1])
            self.study.changes.append(self.row(part, side.label, START, "overlap", subspace_overlap(p, q), level))

    def _add_change(self, part: str, label: str, origin: str, change: Change) -> None:
        for name in ("magnitude", "relative_magnitude", "direction"):
            self.study.changes.append(self.row(part, label, origin, name, getattr(change, name)))
        left_out = self.row(part, label, origin, "columns_without_direction", change.without_direction)
        self.study.changes.append(left_out)

    def _update(self, side: _Side, weight: Tensor | None) -> None:
        """Singular values of s B A, and W0 against W0 + s B A."""
        update, label, norms = side.now.update, side.label, self.study.norms
        if update is None:
            self.skip(label, "", "sBA", "effective_rank", "needs VeRA's frozen projections, not read")
            return
        spectrum = update_spectrum(update.a, update.b, 1.0 if update.s is None else update.s)
        norms.append(self.row("sBA", label, "", "effective_rank", spectrum.effective_rank))
        norms.append(self.row("sBA", label, "", "stable_rank", spectrum.stable_rank))
        if update.s is None:
            self.skip(label, "", "sBA", "frobenius", "the folder does not say s")
        else:
            norms.append(self.row("sBA", label, "", "frobenius", spectrum.frobenius))
        if weight is None:
            return
        wanted = (update.b.shape[0], update.a.shape[1])
        if update.s is None:
            self.skip(label, W0, "W", "change", "the folder does not say s")
        elif tuple(weight.shape) != wanted or not weight.is_floating_point():
            shown = f"{list(weight.shape)} of {weight.dtype}, not {list(wanted)} of a floating dtype"
            self.skip(label, W0, "W", "change", f"the base's weight is {shown}")
        else:
            self._add_change("W", label, W0, merged_change(weight, update.a, update.b, update.s))


def _columns(tensor: Tensor) -> Tensor:
    """A vector as one column: its length and its direction are what can change."""
    return tensor if tensor.dim() == 2 else tensor[:, None]


def cosines(tensors: Sequence[Tensor]) -> Tensor:
    """`similarity.cosine` of all pairs `[n, n]`; NaN where shapes differ or one is zero."""
    table = _nan(len(tensors))
    for same in _groups([tuple(t.shape) for t in tensors]):
        directions = torch.stack([unit_vector(double(tensors[i]).flatten()) for i in same])
        table[torch.tensor(same)[:, None], torch.tensor(same)] = (directions @ directions.T).clamp(-1.0, 1.0)
    return table


def overlaps(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`similarity.subspace_overlap` of all pairs `[n, n]`, and the level of chance; NaN where rows differ in length."""
    bases = [row_basis("matrix", matrix, None) for matrix in matrices]
    table, level = _nan(len(bases)), _nan(len(bases))
    for same in _groups([basis.shape[1] for basis in bases]):
        owner = torch.repeat_interleave(torch.tensor([len(bases[i]) for i in same]))
        of = torch.nn.functional.one_hot(owner, len(same)).double()  # [sum of ranks, n]
        stacked = torch.cat([bases[i] for i in same])
        squares = of.T @ (stacked @ stacked.T).square() @ of
        ranks, k = of.sum(0), stacked.shape[1]
        at = torch.tensor(same)[:, None], torch.tensor(same)
        table[at] = (squares / torch.minimum(ranks[:, None], ranks)).clamp(max=1.0)  # 0 / 0 of zeros: NaN, as wanted
        levels = [[chance(int(r), int(q), k) if r and q else torch.nan for q in ranks] for r in ranks]
        level[at] = torch.tensor(levels, dtype=torch.float64)
    return table, level


def _nan(n: int) -> Tensor:
    return torch.full((n, n), torch.nan, dtype=torch.float64)


def _groups(keys: Sequence[Any]) -> list[list[int]]:
    return [[i for i, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)]


def _notes(study: Analysis, given: Sequence[Unit], start: bool, base: bool) -> list[str]:
    """What a reader must know before the numbers."""
    able = [unit for unit in given if unit.shapes]
    pairs = len(able) * (len(able) - 1) // 2
    bases = sorted({unit.base for unit in given if unit.base})
    kinds = dict.fromkeys(unit.kind for unit in able)
    first_parts = [frozenset(next(iter(unit.shapes.values()))) for unit in able]
    shared = frozenset[str]().union(*(unit.shared for unit in able))
    owner_of_b = "Tasks of one ALoRA folder"
    if SOFT in kinds:
        owner_of_b = "Experts of one soft ALoRA folder" if len(kinds) == 1 else "Tasks or experts of one ALoRA folder"
    notes = {
        "There is one unit, so nothing to compare it with: below are its changes, ranks and norms.": pairs == 0,
        "Two units make one pair: there is no spread over pairs; ± is the spread over modules.": pairs == 1,
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
