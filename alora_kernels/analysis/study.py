"""Compare adapters, tasks or clients with each other, with their start and with the base: one `Analysis`.

In:   `Unit`s; the start they were trained from and the base model, if known.
Out:  an `Analysis`.
Who:  users in Python, `alora analyze`.

Works module by module: in memory are the matrices of one module of all units, and the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.config import refused
from .compare import W0, Found, Side, measure
from .conflict_files import conflict_files
from .names import distinct, places
from .result import Analysis, Described, Skipped
from .sources import units
from .units import HYDRA, SOFT, Loaded, Unit


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
    checked = _checked(units)
    labels = distinct([unit.names for unit in checked])
    starts = _starts(checked, init)
    at = places({module for unit in checked for module in unit.shapes})
    weights = _weights(base, at) if base is not None else None
    study = Analysis([_described(unit, label) for unit, label in zip(checked, labels, strict=True)], at)
    left: dict[tuple[str, str, str, str, str], list[str]] = {}
    with _one_thread():
        for done, (module, place) in enumerate(at.items(), 1):
            sides = [
                _side(unit, label, starts.get(id(unit)), module)
                for unit, label in zip(checked, labels, strict=True)
                if module in unit.shapes
            ]
            found = measure(module, place, sides, None if weights is None else weights(module), init is not None)
            _absent(found, checked, labels, module)
            if weights is not None and weights(module) is None:
                found.skipped += [(side.label, W0, "W", "change", "the base has no such module") for side in sides]
            study.similarity += found.similarity
            study.changes += found.changes
            study.norms += found.norms
            for reason in found.skipped:
                left.setdefault(reason, []).append(module)
            if progress is not None:
                progress(done, len(at))
    study.skipped = [Skipped(*reason, tuple(modules)) for reason, modules in left.items()]
    study.skipped += [Skipped(label, "", "all", "all", u.why, ()) for u, label in zip(checked, labels) if u.why]
    study.notes = _notes(study, checked, init is not None, base is not None)
    folders = dict.fromkeys(unit.folder for unit in checked)
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


def _checked(given: Sequence[Unit]) -> list[Unit]:
    if not given:
        raise ValueError("units is empty: give at least one")
    seen: set[tuple[Path, tuple[str, ...]]] = set()
    for unit in given:
        key = unit.folder.resolve(), unit.names[:1]
        if key in seen:
            raise ValueError(f"{unit.folder} is given twice: give each folder once")
        seen.add(key)
    return list(given)


def _described(unit: Unit, label: str) -> Described:
    return Described(label, unit.kind, len(unit.shapes), unit.rank, unit.base, unit.folder)


def _side(unit: Unit, label: str, start: Unit | None, module: str) -> Side:
    before: Loaded | None = start.read(module) if start is not None and module in start.shapes else None
    return Side(label, unit.read(module), before, dict.fromkeys(unit.shared, unit.folder))


def _starts(checked: Sequence[Unit], init: Sequence[Unit] | str | Path | None) -> dict[int, Unit]:
    """id of a unit -> its start."""
    if init is None:
        return {}
    given = list(units(init)) if isinstance(init, str | Path) else list(init)
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


def _absent(found: Found, checked: Sequence[Unit], labels: Sequence[str], module: str) -> None:
    """Pairs of which one has no adapter at the module."""
    having = [label for unit, label in zip(checked, labels) if module in unit.shapes]
    missing = [label for unit, label in zip(checked, labels) if unit.shapes and module not in unit.shapes]
    found.skipped += [(one, two, "all", "all", f"{two} has no adapter there") for one in having for two in missing]


def _notes(study: Analysis, checked: Sequence[Unit], start: bool, base: bool) -> list[str]:
    """What a reader must know before the numbers."""
    notes = []
    able = [unit for unit in checked if unit.shapes]
    pairs = len(able) * (len(able) - 1) // 2
    if pairs == 0:
        notes.append("There is one unit, so nothing to compare it with: below are its changes, ranks and norms.")
    elif pairs == 1:
        notes.append("Two units make one pair: there is no spread over pairs; ± is the spread over modules.")
    bases = sorted({unit.base for unit in checked if unit.base})
    if len(bases) > 1:
        notes.append(
            f"The units name different bases ({', '.join(bases)}). Unless these are names of one model, similarity"
            " between them says nothing: equal numbers mean different things in different networks."
        )
    kinds = dict.fromkeys(unit.kind for unit in able)
    if len({frozenset(next(iter(unit.shapes.values()))) for unit in able}) > 1:
        notes.append(f"Units of different kinds ({', '.join(kinds)}): only parts of the same name are compared.")
    if "VeRA" in kinds:
        notes.append("VeRA trains two vectors per module, lambda_d and lambda_b: they have cosines but no subspaces.")
    if any("M" in parts for unit in able for parts in list(unit.shapes.values())[:1]):
        notes.append(
            "Clients of unequal rank: compared are each client's own A, M, B1 and B2, and the merged B they share. B2"
            " goes into B after every round and is zero at the end of a run."
        )
    sharing = {"B": "Tasks of one ALoRA folder", "A": "Experts of one HydraLoRA folder"}
    if SOFT in kinds:
        sharing["B"] = "Experts of one soft ALoRA folder" if len(kinds) == 1 else "Tasks or experts of one ALoRA folder"
    for part, owner in sharing.items():
        if any(part in unit.shared for unit in able):
            notes.append(f"{owner} share one {part}: it is not compared with itself.")
    if SOFT in kinds or HYDRA in kinds:
        notes.append("s B A of an expert is the change that its router would make by giving it all the weight.")
    if not start:
        notes.append(
            "No start was given (--init): the change of B is measured from zero, where LoRA and ALoRA begin it; of A it"
            " is not known."
        )
    if not base:
        notes.append("No base was given (--base): the change from W0 to W0 + s B A is not measured.")
    if all(place.layer is None for place in study.places.values()):
        notes.append("Module names hold no layer number: there are no curves over the layers.")
    return notes
