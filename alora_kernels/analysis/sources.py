"""Folders become `Unit`s: the adapters, tasks or clients that are compared with each other.

ALoRA and LoRA go through `read_adapter`, which distrusts folders of strangers; the other formats are read here in the
same spirit: JSON and safetensors only, every number looked at once. Afterwards a file stays open and one module's
matrices are read when asked for, so 16 tasks of a large model never have to be in memory together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import files
from ..adapters.config import AdapterFolderError, checked_config, not_finite, read_settings, refused
from ..adapters.method import SETTINGS, STATE, read_method
from ..adapters.reader import FLOATS, opened, read_adapter
from ..modules.adapter import lora_scaling
from ..tensor_file import Stamp
from ..text import printable
from ..tuner.config import CONFIG, PREFIX, WEIGHTS, unwrapped
from ..tuner.register import NAME as ALORA

HYDRA, SOFT = "HydraLoRA, one expert", "ALoRA, one expert"
#: kind of unit -> the parts that its folder stacks, a slice for each unit; the parts that its units share
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "LoRA per task": (("A", "B"), ()),
    "ALoRA": (("A",), ()),
    "ALoRA, one task": (("A",), ("B",)),
    SOFT: (("A", "router"), ("B",)),
    HYDRA: (("B",), ("A",)),
}
FINAL, UNEQUAL = "final.safetensors", "fed-alora-het"  # of `alora fed`: a client's finished matrices, and the method
HET = ("A", "M", "B1", "B2", "B")
LONGEST = 256  # characters of a name that came with a folder
SOUGHT = (
    f"an adapter folder ({CONFIG} and {WEIGHTS}: ALoRA, LoRA or VeRA; {SETTINGS} and {STATE}: LoRA per task or"
    " HydraLoRA), or a federated run"
    f" (clients/*/*/adapter, or clients/*/*/{FINAL} of {UNEQUAL})"
)
_VERA = re.compile(re.escape(PREFIX) + r"(.{1,256})\.vera_(lambda_[bd])")
_HET = re.compile(r"(.{1,256})\.(A|M|B1|B2|B)")
_SOFT = re.compile(re.escape(PREFIX) + r"(.{1,256})\.asymlora_(A|B|router)(?:\.weight)?")
_STATE = re.compile(r"(.{1,256})\.lora_([AB])")
Parts = dict[str, Tensor]
Found = dict[str, dict[str, tuple[str, tuple[int, ...]]]]  # module -> part -> (key, shape)


class Update(NamedTuple):
    """The change of a weight, s B A: a `[R, K]`, b `[N, R]`, and s, or None where the folder does not say."""

    a: Tensor
    b: Tensor
    s: float | None


class Loaded(NamedTuple):
    """One module of one unit: its matrices by part, and what they do to the weight, if it is s B A."""

    parts: Parts
    update: Update | None


@dataclass(frozen=True, eq=False)
class Unit:
    """Something to compare: one task of an adapter, one adapter, or one client.

    Parts are A and B; router, an expert's row of it, of soft ALoRA; lambda_d and lambda_b of VeRA; A, M, B1, B2 and B
    of clients with unequal ranks.
    """

    names: tuple[str, ...]  # from the most special to the most general: task or client, folder, its parents
    kind: str  # what it is, in words
    folder: Path
    base: str | None  # the base model's name, if the folder gives it
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]  # module -> part -> shape
    read: Callable[[str], Loaded] = field(repr=False)
    shared: frozenset[str] = frozenset()  # parts that all units of the same folder hold as one matrix
    why: str = ""  # where there are no shapes, the reason

    @property
    def name(self) -> str:
        """The task, the client or the folder."""
        return self.names[0]

    @property
    def rank(self) -> int | None:
        """The largest rank of any A; None without one."""
        return max((parts["A"][0] for parts in self.shapes.values() if "A" in parts), default=None)


def units(path: str | Path) -> list[Unit]:
    """What there is to compare in a folder: at least one unit; clients that never finished have no shapes, and say why.

    `path` is an ALoRA or LoRA-per-task folder (a unit per task), a soft ALoRA or HydraLoRA folder (a unit per expert),
    a LoRA or VeRA folder (one unit), a federated run (a unit per client), one client's folder in it, or the output
    folder of `alora train`. An AdapterFolderError names folder and module of what is none of these, damaged, or not
    finite.
    """
    folder = Path(os.path.abspath(path))
    if not folder.exists():
        raise refused(folder, f"no such folder: give {SOUGHT}")
    if not folder.is_dir():
        raise refused(folder, "is a file: give the folder that holds it")
    if folder.parent.parent.name == "clients" and not (folder / CONFIG).is_file():
        found = _client(folder)
        if found[0].why:
            raise refused(folder, found[0].why)
        return found
    for place in (folder, folder / "adapter"):  # the second: the output folder of `alora train`
        if (place / CONFIG).is_file():
            return _adapter(place, _words(folder))
        if (place / STATE).is_file():
            return _stacked(place, _words(folder))
    clients = sorted((p for p in folder.glob("clients/*/*") if p.is_dir()), key=lambda p: (p.name, p))
    found = [unit for client in clients for unit in _client(client)]
    if any(unit.shapes for unit in found):
        return found
    if found:
        raise refused(folder, f"no client has finished: {found[0].why}")
    inside = sorted({p.parent.name for pattern in (f"*/{CONFIG}", "*/clients") for p in folder.glob(pattern)})
    hint = f"; give its subfolders: {', '.join(inside[:5])}" if inside else ""
    raise refused(folder, f"is none of what can be looked into: {SOUGHT}{hint}")


def _clean(text: str) -> str:
    return printable(text, LONGEST)


def _words(folder: Path) -> tuple[str, ...]:
    return tuple(_clean(part) for part in reversed(folder.parts))


@dataclass
class _Weights:
    """A safetensors file that was checked, opened again when its numbers are needed."""

    folder: Path
    name: str
    stamp: Stamp
    found: Found
    metadata: Mapping[str, str] = field(default_factory=dict)

    def _read(self, module: str, row: Callable[[str], int | None]) -> Parts:
        """The parts of a module; of a stacked one that row alone."""
        with opened(self.folder, self.stamp, self.name) as file:
            return {part: file.read(key, row(part)) for part, (key, _) in self.found[module].items()}

    def units(
        self, names: Iterable[tuple[str, ...]], kind: str, base: Any, update: Callable[[str, Parts], Update] | None
    ) -> list[Unit]:
        """A unit for each of `names`, in the order of slices; `update` makes the change of a module's weight."""
        stacked, shared = LAYOUTS.get(kind, ((), ()))

        def read(row: int, module: str) -> Loaded:
            parts = self._read(module, lambda part: row if part in stacked else None)
            return Loaded(parts, None if update is None else update(module, parts))

        shapes = {
            module: {part: shape[1:] if part in stacked else shape for part, (_, shape) in parts.items()}
            for module, parts in self.found.items()
        }
        base, same = _clean(base) if isinstance(base, str) and base else None, frozenset(shared)
        return [Unit(own, kind, self.folder, base, shapes, partial(read, row), same) for row, own in enumerate(names)]


def _matched(
    folder: Path, name: str, pattern: re.Pattern[str], dimensions: Mapping[str, tuple[int, ...]], checksum: bool = False
) -> _Weights:
    """The file with its tensors whose names match `pattern` (module, part), and with `checksum` its metadata.

    Other tensors (heads, frozen projections) are left alone. `dimensions`: part -> how many it may have. `checksum`:
    `files.write` made the file. Raises AdapterFolderError: damaged, nothing matches, wrong dimensions, NaN or infinity.
    """
    found, bad = Found(), list[str]()
    with opened(folder, name=name) as file:
        metadata = files.read(folder / name)[1] if checksum else {}
        for key in sorted(file.keys()):
            match = pattern.fullmatch(unwrapped(key)) if key.isprintable() else None
            if match is None:
                continue
            shape, dtype, (module, part) = file.shape(key), file.dtype(key), match.groups()
            if len(shape) not in dimensions[part] or 0 in shape or dtype not in FLOATS:
                raise refused(folder, f"{module}: {part} has shape {list(shape)} of {dtype}, which is not what it"
                              " must be: copy the file again")  # fmt: skip
            if not file.finite(key):
                bad.append(f"{part} of {module}")
            found.setdefault(module, {})[part] = (key, shape)
    if bad:
        raise not_finite(folder, bad)
    if not found:
        raise refused(folder, f"{name} holds nothing that can be compared: is it the right folder?")
    return _Weights(folder, name, file.stamp, found, metadata)


def _adapter(folder: Path, names: tuple[str, ...], client: bool = False) -> list[Unit]:
    """A saved PEFT adapter; of a client its own name is kept."""
    try:
        settings = read_settings(folder)
    except AdapterFolderError:  # `read_adapter` says what is wrong
        settings = {}
    if settings.get("peft_type") == "VERA":
        weights = _matched(folder, WEIGHTS, _VERA, {"lambda_b": (1,), "lambda_d": (1,)})
        return weights.units([names], "VeRA", settings.get("base_model_name_or_path"), None)
    if settings.get("peft_type") == ALORA and settings.get("routing") == "soft":
        return _soft(folder, names, settings)
    file = read_adapter(folder)
    file.refuse_experts("comparing units")
    alora, several = file.config.kind == "alora", len(file.tasks) > 1
    stack = (len(file.tasks),) if alora else ()
    found = {
        module: {"A": (keys["A"], (*stack, at.r, at.k)), "B": (keys["B"], (at.n, at.r))}
        for (module, keys), at in zip(file.keys.items(), file.shapes.values(), strict=True)
    }
    kind = "ALoRA, one task" if several else "ALoRA" if alora else "LoRA"
    own_name = not alora or (client and not several)
    of_tasks = [names if own_name else (_clean(task), *names) for task in file.tasks]
    weights = _Weights(folder, WEIGHTS, file.stamp, found)
    return weights.units(of_tasks, kind, file.base, lambda module, p: Update(p["A"], p["B"], file.scaling[module]))


def _soft(folder: Path, names: tuple[str, ...], settings: Mapping[str, Any]) -> list[Unit]:
    """ALoRA's experts under a router: A `[E, R, K]`, B `[N, R]`, router `[E, K]`."""
    count = settings.get("num_experts")
    as_tasks = {key: value for key, value in settings.items() if key != "num_experts"}
    config = checked_config(folder, as_tasks | {"routing": "task", "tasks": count})  # as many A as there are experts
    weights = _matched(folder, WEIGHTS, _SOFT, {"A": (3,), "B": (2,), "router": (2,)})
    for module, parts in weights.found.items():
        a, b, router = (parts[part][1] if part in parts else () for part in ("A", "B", "router"))
        if not (a[:1] == router[:1] == (count,) and a[1:2] == b[1:] == (config.rank(module),) and a[2:] == router[1:]):
            raise refused(folder, f"{module}: A is {list(a)}, B {list(b)}, the router {list(router)}, which is not what"
                          f" {count} experts of rank {config.rank(module)} make; copy the folder again")  # fmt: skip

    def update(module: str, parts: Parts) -> Update:
        return Update(parts["A"], parts["B"], config.scaling(module, len(parts["A"])))

    experts = [(f"expert {i}", *names) for i in range(len(config.tasks))]
    return weights.units(experts, SOFT, config.base, update)


def _stacked(folder: Path, names: tuple[str, ...]) -> list[Unit]:
    """A LoRA per task, or HydraLoRA's experts, which share one A: `[E, R, K]` or `[R, K]`, `[E, N, R]`."""
    method = read_method(folder)
    weights = _matched(folder, STATE, _STATE, {"A": (2, 3), "B": (2, 3)})
    if method is None:
        raise refused(folder, f"holds {STATE} without {SETTINGS}: copy the whole folder")
    hydra = method.name == "hydralora"
    labels = [f"expert {i}" for i in range(method.num_experts)] if hydra else [_clean(task) for task in method.tasks]
    count = len(labels)
    for module, parts in weights.found.items():
        a, b = (parts[part][1] if part in parts else () for part in "AB")
        if len(b) != 3 or len(a) != 3 - hydra or b[0] != count or a[-2] != b[2] or (not hydra and a[0] != count):
            raise refused(folder, f"{module}: A is {list(a)} and B {list(b)}, which is not what {method.name} of"
                          f" {count} makes; copy the folder again")  # fmt: skip

    def update(_: str, parts: Parts) -> Update:
        a, b = parts["A"], parts["B"]
        return Update(a, b, lora_scaling(method.alpha, len(a), method.use_rslora))

    kind = HYDRA if hydra else "LoRA per task"
    return weights.units([(label, *names) for label in labels], kind, None, update)


def _client(folder: Path) -> list[Unit]:
    """A client's finished adapter: PEFT's folder, or the matrices of unequal ranks.

    It is called by client, run and the run's parents; the run's token, which means nothing to people, comes last.
    """
    client, token, _, *run = _words(folder)
    names = (client, *run, token)
    if (folder / "adapter" / CONFIG).is_file():
        return _adapter(folder / "adapter", names, client=True)
    if (folder / FINAL).is_file():
        return _unequal(folder, names)
    why = f"{folder} has neither adapter/{CONFIG} nor {FINAL}, which the end of a run writes"
    return [Unit(names, "unfinished client", folder, None, {}, dict[str, Loaded]().__getitem__, why=why)]


def _unequal(folder: Path, names: tuple[str, ...]) -> list[Unit]:
    """A client of Fed-ALoRA with unequal ranks: its change of the weight is s (B + B2 B1) (M A)."""
    weights = _matched(folder, FINAL, _HET, dict.fromkeys(HET, (2,)), checksum=True)
    found, metadata = weights.found, weights.metadata
    if (method := metadata.get("method")) != UNEQUAL:
        raise refused(folder, f"{FINAL} is of the method {method!r}, whose clients have an adapter folder"
                      " beside it: copy that too")  # fmt: skip
    for module, parts in found.items():
        if sorted(parts) != sorted(HET):
            raise refused(folder, f"{module} must have {', '.join(HET)} in {FINAL}: the file is incomplete")
        a, m, b1, b2, b = (parts[part][1] for part in HET)
        if not (a[0] == m[1] == b1[0] == b2[1] and m[0] == b1[1] == b[1] and b2[0] == b[0]):
            raise refused(folder, f"{module}: the shapes in {FINAL} do not fit each other; copy it again")
        found[module] = {part: parts[part] for part in HET}
    try:  # files of earlier versions do not say s
        s = float(metadata["scaling"]) if "scaling" in metadata else None
    except ValueError:
        raise refused(folder, f"{FINAL} says s is {metadata['scaling'][:40]!r}: copy it again") from None

    def update(_: str, parts: Parts) -> Update:
        a, m, b1, b2, b = (parts[part].double() for part in HET)
        return Update(m @ a, b + b2 @ b1, s)

    return weights.units([names], "Fed-ALoRA client, own rank", None, update)
