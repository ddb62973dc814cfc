"""One module of several units: what is measured of it, and what is not, with the reason.

In:   the matrices of each unit that has the module; their starts and the base weight, if known.
Out:  `Row`s of similarity, of change and of size; reasons for every pair that was left out.
Who:  `study.compare_units`, module by module.

The formulas are those of `similarity`, `change` and `spectrum`; here each basis is computed once instead of once per
pair (16 tasks: 16 decompositions, not 240).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .change import Change, column_change, merged_change
from .names import Place
from .similarity import chance, cosine, row_basis, subspace_overlap, unit
from .spectrum import update_spectrum
from .table import Row, rows_at
from .units import Loaded

#: which side of a part spans the space that units share: A reads from K inputs, B writes to N outputs, M and B1 meet
#: in the d_m dimensions that clients of unequal rank have in common
TRANSPOSED = {"A": False, "B": True, "M": True, "B1": False, "B2": True}
ZERO, START, W0 = "zero", "start", "W0"  # what a change is measured from
BEGINS_AT_ZERO = ("B", "B2", "lambda_b")
SAME = "one matrix: the units of this folder share it"
NO_DIRECTION = "all zeros: it has no direction"


@dataclass
class Side:
    """One unit's share in a module: its label, its matrices, its start if known, and what it shares with others."""

    label: str
    now: Loaded
    start: Loaded | None = None
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """Rows of one module, and what was left out: (unit1, unit2, part, measure, reason)."""

    similarity: list[Row] = field(default_factory=list)
    changes: list[Row] = field(default_factory=list)
    norms: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str, str, str, str]] = field(default_factory=list)


def measure(module: str, place: Place, sides: Sequence[Side], weight: Tensor | None, known_start: bool) -> Found:
    """Everything about one module.

    Args:
        module, place: its name.
        sides: the units that have it.
        weight: W0 `[N, K]`, if a base was given and has it.
        known_start: whether starts were given; without them B is measured from zero.
    """
    found, make = Found(), rows_at(place, module)
    for part in dict.fromkeys(part for side in sides for part in side.now.parts):
        having = [side for side in sides if part in side.now.parts]
        _compare(found, make, part, having)
        for side in having:
            _size(found, make, part, side)
            _change(found, make, part, side, known_start)
    for side in sides:
        _update(found, make, side, weight)
    for i, one in enumerate(sides):
        for two in sides[i + 1 :]:
            if not one.now.parts.keys() & two.now.parts.keys():
                parts = " and ".join(", ".join(side.now.parts) for side in (one, two))
                found.skipped.append((one.label, two.label, "all", "all", f"no part in common: {parts}"))
    return found


def cosines(tensors: Sequence[Tensor]) -> Tensor:
    """`similarity.cosine` of all pairs `[n, n]`; NaN where shapes differ or one is zero."""
    table = _nan(len(tensors))
    for same in _groups([tuple(t.shape) for t in tensors]):
        directions = torch.stack([unit(_double(tensors[i]).flatten()) for i in same])
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
        ranks = of.sum(0)
        k = stacked.shape[1]
        at = torch.tensor(same)[:, None], torch.tensor(same)
        table[at] = (squares / torch.minimum(ranks[:, None], ranks)).clamp(max=1.0)  # 0 / 0 of zeros: NaN, as wanted
        level[at] = torch.tensor(
            [[chance(int(r), int(q), k) if r and q else torch.nan for q in ranks] for r in ranks], dtype=torch.float64
        )
    return table, level


def _nan(n: int) -> Tensor:
    return torch.full((n, n), torch.nan, dtype=torch.float64)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def _groups(keys: Sequence[Any]) -> list[list[int]]:
    return [[i for i, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)]


def _compare(found: Found, make: Callable[..., Row], part: str, sides: Sequence[Side]) -> None:
    """Every pair of one part, once."""
    if len(sides) < 2:
        return
    owners = {side.shared.get(part) for side in sides}
    if len(owners) == 1 and None not in owners:  # no decompositions for what is skipped anyway
        pairs = [(one.label, two.label) for i, one in enumerate(sides) for two in sides[i + 1 :]]
        found.skipped += [(*pair, part, "all", SAME) for pair in pairs]
        return
    tensors = [side.now.parts[part] for side in sides]
    alike = cosines(tensors)
    spaces = part in TRANSPOSED
    overlap, level = overlaps([t.T if TRANSPOSED[part] else t for t in tensors]) if spaces else (alike, alike)
    zero = [not bool(t.any()) for t in tensors]
    for i, one in enumerate(sides):
        for j in range(i + 1, len(sides)):
            two = sides[j]
            names = one.label, two.label
            if part in one.shared and one.shared[part] == two.shared.get(part):
                found.skipped.append((*names, part, "all", SAME))
                continue
            if zero[i] or zero[j]:
                found.skipped.append((*names, part, "all", NO_DIRECTION))
                continue
            shapes = f"{list(tensors[i].shape)} and {list(tensors[j].shape)}"
            if tensors[i].shape == tensors[j].shape:
                found.similarity.append(make(part, *names, "cosine", alike[i, j]))
            else:
                found.skipped.append((*names, part, "cosine", f"needs one shape: {shapes}"))
            if not spaces:
                found.skipped.append((*names, part, "overlap", "a vector has no subspace"))
            elif overlap[i, j].isfinite():
                found.similarity.append(make(part, *names, "overlap", overlap[i, j], float(level[i, j])))
            else:
                side = "outputs" if TRANSPOSED[part] else "inputs"
                found.skipped.append((*names, part, "overlap", f"needs one number of {side}: {shapes}"))


def _size(found: Found, make: Callable[..., Row], part: str, side: Side) -> None:
    norm = torch.linalg.vector_norm(_double(side.now.parts[part]))
    found.norms.append(make(part, side.label, "", "frobenius", norm))


def _change(found: Found, make: Callable[..., Row], part: str, side: Side, known_start: bool) -> None:
    """Length and direction of the columns against the start; without one, B's lengths against zero."""
    after = side.now.parts[part]
    if known_start:
        before = None if side.start is None else side.start.parts.get(part)
        if before is None or before.shape != after.shape:
            shapes = "it is not there" if before is None else f"shape {list(before.shape)}, not {list(after.shape)}"
            found.skipped.append((side.label, START, part, "change", f"the start does not fit: {shapes}"))
            return
        name = START
    elif part in BEGINS_AT_ZERO:
        before, name = torch.zeros_like(after), ZERO
    else:
        return
    _rows_of_change(found, make, part, side.label, name, column_change(_columns(before), _columns(after)))
    if name == START:
        p, q = (t.T if TRANSPOSED.get(part) else t for t in (_columns(before), _columns(after)))
        found.changes.append(make(part, side.label, name, "cosine", cosine(p, q)))
        if part in TRANSPOSED:
            level = chance(p.shape[0], q.shape[0], p.shape[1])
            found.changes.append(make(part, side.label, name, "overlap", subspace_overlap(p, q), level))


def _columns(tensor: Tensor) -> Tensor:
    """A vector as one column: its length and its direction are what can change."""
    return tensor if tensor.dim() == 2 else tensor[:, None]


def _rows_of_change(found: Found, make: Callable[..., Row], part: str, label: str, name: str, change: Change) -> None:
    for measure_, value in (
        ("magnitude", change.magnitude),
        ("relative_magnitude", change.relative_magnitude),
        ("direction", change.direction),
        ("columns_without_direction", float(change.without_direction)),
    ):
        found.changes.append(make(part, label, name, measure_, value))


def _update(found: Found, make: Callable[..., Row], side: Side, weight: Tensor | None) -> None:
    """Singular values of s B A, and W0 against W0 + s B A."""
    update = side.now.update
    if update is None:
        found.skipped.append((side.label, "", "sBA", "effective_rank", "needs VeRA's frozen projections, not read"))
        return
    spectrum = update_spectrum(update.a, update.b, 1.0 if update.s is None else update.s)
    found.norms.append(make("sBA", side.label, "", "effective_rank", spectrum.effective_rank))
    found.norms.append(make("sBA", side.label, "", "stable_rank", spectrum.stable_rank))
    if update.s is None:
        found.skipped.append((side.label, "", "sBA", "frobenius", "the folder does not say s"))
    else:
        found.norms.append(make("sBA", side.label, "", "frobenius", spectrum.frobenius))
    if weight is None:
        return
    wanted = (update.b.shape[0], update.a.shape[1])
    if update.s is None:
        found.skipped.append((side.label, W0, "W", "change", "the folder does not say s"))
    elif tuple(weight.shape) != wanted or not weight.is_floating_point():
        shown = f"{list(weight.shape)} of {weight.dtype}, not {list(wanted)} of a floating dtype"
        found.skipped.append((side.label, W0, "W", "change", f"the base's weight is {shown}"))
    else:
        change = merged_change(weight, update.a, update.b, update.s)
        _rows_of_change(found, make, "W", side.label, W0, change)
