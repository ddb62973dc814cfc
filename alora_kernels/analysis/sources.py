"""Folders become `Unit`s: the adapters, tasks or clients that are compared with each other.

In:   paths: a folder with an ALoRA, LoRA, VeRA, LoRA-per-task or HydraLoRA adapter; a federated run, one client of it.
Out:  `Unit`s: their matrices by part, one module at a time.
Who:  users in Python, `alora analyze`.

ALoRA and LoRA go through `read_adapter`, which distrusts folders of strangers; the other two formats are read here in
the same spirit: JSON and safetensors only, every number looked at once. Afterwards a file stays open and one module's
matrices are read when asked for, so 16 tasks of a large model never have to be in memory together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapters.config import AdapterFolderError, checked_config, read_settings, refused
from ..adapters.method import SETTINGS, STATE, read_method
from ..adapters.reader import PREFIX, AdapterFile, read_adapter
from ..modules.init import lora_scaling
from ..tuner.config import CONFIG, WEIGHTS
from ..tuner.register import NAME as ALORA
from .names import clean
from .units import HYDRA, SOFT, Loaded, Unit, Update
from .weights import Weights, matched

FINAL, UNEQUAL = "final.safetensors", "fed-alora-het"  # of `alora fed`: a client's finished matrices, and the method
SOUGHT = (
    f"an adapter folder ({CONFIG} and {WEIGHTS}: ALoRA, LoRA or VeRA; {SETTINGS} and {STATE}: LoRA per task or"
    " HydraLoRA), or a federated run"
    f" (clients/*/*/adapter, or clients/*/*/{FINAL} of {UNEQUAL})"
)
_VERA = re.compile(re.escape(PREFIX) + r"(.{1,256})\.vera_lambda_([bd])")
_HET = re.compile(r"(.{1,256})\.(A|M|B1|B2|B)")
_SOFT = re.compile(re.escape(PREFIX) + r"(.{1,256})\.asymlora_(A|B|router)(?:\.weight)?")
_STATE = re.compile(r"(.{1,256})\.lora_([AB])")


def units(path: str | Path) -> list[Unit]:
    """What there is to compare in a folder.

    Args:
        path: an ALoRA or LoRA-per-task folder (a unit per task), a soft ALoRA or HydraLoRA folder (a unit per expert),
            a LoRA or VeRA folder (one unit), a federated run (a unit per client), or one client's folder in it; also
            the output folder of `alora train`.

    Returns:
        At least one; clients that never finished have no shapes, and say why.

    Raises:
        AdapterFolderError: none of these, damaged, or numbers that are not finite; the folder and module are named.
    """
    folder = Path(os.path.abspath(path))
    if not folder.exists():
        raise refused(folder, f"no such folder: give {SOUGHT}")
    if not folder.is_dir():
        raise refused(folder, "is a file: give the folder that holds it")
    if (folder / CONFIG).is_file():
        return _adapter(folder, _words(folder))
    if folder.parent.parent.name == "clients":
        found = _client(folder, _of_client(folder))
        if found[0].why:
            raise refused(folder, found[0].why)
        return found
    if (folder / STATE).is_file():
        return _stacked(folder, _words(folder))
    if (folder / "adapter" / CONFIG).is_file():  # the output folder of `alora train`
        return _adapter(folder / "adapter", _words(folder))
    if (folder / "adapter" / STATE).is_file():
        return _stacked(folder / "adapter", _words(folder))
    clients = sorted((p for p in folder.glob("clients/*/*") if p.is_dir()), key=lambda p: (p.name, p))
    found = [unit for p in clients for unit in _client(p, _of_client(p))]
    if any(unit.shapes for unit in found):
        return found
    if found:
        raise refused(folder, f"no client has finished: {found[0].why}")
    inside = sorted({p.parent.name for pattern in (f"*/{CONFIG}", "*/clients") for p in folder.glob(pattern)})
    hint = f"; give its subfolders: {', '.join(inside[:5])}" if inside else ""
    raise refused(folder, f"is none of what can be looked into: {SOUGHT}{hint}")


def _words(folder: Path) -> tuple[str, ...]:
    return tuple(clean(part) for part in reversed(folder.parts))


def _of_client(folder: Path) -> tuple[str, ...]:
    """Client, run and the run's parents; the run's token, which means nothing to people, comes last."""
    client, token, _, *run = _words(folder)
    return client, *run, token


def _adapter(folder: Path, names: tuple[str, ...], client: bool = False) -> list[Unit]:
    """A saved PEFT adapter; of a client its own name is kept."""
    settings = _settings(folder)
    if settings.get("peft_type") == "VERA":
        return [_vera(folder, names, settings)]
    if settings.get("peft_type") == ALORA and settings.get("routing") == "soft":
        return _soft(folder, names, settings)
    file = read_adapter(folder)
    weights = Weights(folder, WEIGHTS, file.stamp)
    if file.config.kind == "lora" or (client and len(file.tasks) == 1):
        return [_of_file(file, weights, 0, names)]
    return [_of_file(file, weights, row, (clean(task), *names)) for row, task in enumerate(file.tasks)]


def _of_file(file: AdapterFile, weights: Weights, row: int, names: tuple[str, ...]) -> Unit:
    stacked = file.config.kind == "alora"

    def read(module: str) -> Loaded:
        keys = file.keys[module]
        a = weights.row(keys["A"], row) if stacked else weights.whole(keys["A"])
        b = weights.whole(keys["B"])
        return Loaded({"A": a, "B": b}, Update(a, b, file.scaling[module]))

    shapes = {module: {"A": (shape.r, shape.k), "B": (shape.n, shape.r)} for module, shape in file.shapes.items()}
    several = stacked and len(file.tasks) > 1
    kind = "ALoRA, one task" if several else "ALoRA" if stacked else "LoRA"
    return Unit(names, kind, file.folder, _named(file.base), shapes, read, frozenset("B" if several else ""))


def _vera(folder: Path, names: tuple[str, ...], settings: Mapping[str, Any]) -> Unit:
    weights, found, _ = matched(
        folder, WEIGHTS, _VERA, {"lambda_b": (1,), "lambda_d": (1,)}, {"b": "lambda_b", "d": "lambda_d"}
    )

    def read(module: str) -> Loaded:
        return Loaded({part: weights.whole(key) for part, (key, _) in found[module].items()}, None)

    shapes = {module: {part: shape for part, (_, shape) in parts.items()} for module, parts in found.items()}
    return Unit(names, "VeRA", folder, _named(settings.get("base_model_name_or_path")), shapes, read)


def _soft(folder: Path, names: tuple[str, ...], settings: Mapping[str, Any]) -> list[Unit]:
    """ALoRA's experts under a router: A `[E, R, K]`, B `[N, R]`, router `[E, K]`."""
    count = settings.get("num_experts")
    as_tasks = {key: value for key, value in settings.items() if key != "num_experts"}
    config = checked_config(folder, as_tasks | {"routing": "task", "tasks": count})  # as many A as there are experts
    weights, found, _ = matched(folder, WEIGHTS, _SOFT, {"A": (3,), "B": (2,), "router": (2,)})
    for module, parts in found.items():
        a, b, router = (parts[part][1] if part in parts else () for part in ("A", "B", "router"))
        if not (a[:1] == router[:1] == (count,) and a[1:2] == b[1:] == (config.rank(module),) and a[2:] == router[1:]):
            raise refused(folder, f"{module}: A is {list(a)}, B {list(b)}, the router {list(router)}, which is not what"
                          f" {count} experts of rank {config.rank(module)} make; copy the folder again")  # fmt: skip

    def unit(row: int) -> Unit:
        def read(module: str) -> Loaded:
            keys = {part: key for part, (key, _) in found[module].items()}
            a, b = weights.row(keys["A"], row), weights.whole(keys["B"])
            parts = {"A": a, "B": b, "router": weights.row(keys["router"], row)}
            return Loaded(parts, Update(a, b, config.scaling(module, a.shape[0])))

        shapes = {
            module: {part: shape if part == "B" else shape[1:] for part, (_, shape) in parts.items()}
            for module, parts in found.items()
        }
        return Unit((f"expert {row}", *names), SOFT, folder, config.base, shapes, read, frozenset("B"))

    return [unit(row) for row in range(len(config.tasks))]


def _stacked(folder: Path, names: tuple[str, ...]) -> list[Unit]:
    """A LoRA per task, or HydraLoRA's experts, which share one A: `[E, R, K]` or `[R, K]`, `[E, N, R]`."""
    method = read_method(folder)
    weights, found, _ = matched(folder, STATE, _STATE, {"A": (2, 3), "B": (2, 3)})
    if method is None:
        raise refused(folder, f"holds {STATE} without {SETTINGS}: copy the whole folder")
    hydra = method.name == "hydralora"
    count = method.num_experts if hydra else len(method.tasks)
    for module, parts in found.items():
        a, b = (parts[part][1] if part in parts else () for part in "AB")
        if len(b) != 3 or len(a) != 3 - hydra or b[0] != count or a[-2] != b[2] or (not hydra and a[0] != count):
            raise refused(folder, f"{module}: A is {list(a)} and B {list(b)}, which is not what {method.name} of"
                          f" {count} makes; copy the folder again")  # fmt: skip

    def unit(row: int, name: str) -> Unit:
        def read(module: str) -> Loaded:
            (key_a, _), (key_b, _) = found[module]["A"], found[module]["B"]
            a = weights.whole(key_a) if hydra else weights.row(key_a, row)
            b = weights.row(key_b, row)
            return Loaded({"A": a, "B": b}, Update(a, b, lora_scaling(method.alpha, a.shape[0], method.use_rslora)))

        shapes = {m: {"A": parts["A"][1][-2:], "B": parts["B"][1][1:]} for m, parts in found.items()}
        kind = HYDRA if hydra else "LoRA per task"
        return Unit((clean(name), *names), kind, folder, None, shapes, read, frozenset("A" if hydra else ""))

    labels = [f"expert {i}" for i in range(count)] if hydra else method.tasks
    return [unit(row, name) for row, name in enumerate(labels)]


def _client(folder: Path, names: tuple[str, ...]) -> list[Unit]:
    """A client's finished adapter: PEFT's folder, or the matrices of unequal ranks."""
    if (folder / "adapter" / CONFIG).is_file():
        return _adapter(folder / "adapter", names, client=True)
    if (folder / FINAL).is_file():
        return [_unequal(folder, names)]
    why = f"{folder} has neither adapter/{CONFIG} nor {FINAL}, which the end of a run writes"
    return [Unit(names, "unfinished client", folder, None, {}, _nothing, why=why)]


def _nothing(module: str) -> Loaded:
    raise KeyError(module)


def _unequal(folder: Path, names: tuple[str, ...]) -> Unit:
    """A client of Fed-ALoRA with unequal ranks: its change of the weight is s (B + B2 B1) (M A)."""
    needed = ["A", "M", "B1", "B2", "B"]
    weights, found, metadata = matched(folder, FINAL, _HET, dict.fromkeys(needed, (2,)), checksum=True)
    if metadata.get("method") != UNEQUAL:
        method = metadata.get("method")
        raise refused(folder, f"{FINAL} is of the method {method!r}, whose clients have an adapter folder"
                      " beside it: copy that too")  # fmt: skip
    for module, parts in found.items():
        if sorted(parts) != sorted(needed):
            raise refused(folder, f"{module} must have {', '.join(needed)} in {FINAL}: the file is incomplete")
        a, m, b1, b2, b = (parts[part][1] for part in needed)
        if not (a[0] == m[1] == b1[0] == b2[1] and m[0] == b1[1] == b[1] and b2[0] == b[0]):
            raise refused(folder, f"{module}: the shapes in {FINAL} do not fit each other; copy it again")

    try:  # files of earlier versions do not say s
        s = float(metadata["scaling"]) if "scaling" in metadata else None
    except ValueError:
        raise refused(folder, f"{FINAL} says s is {metadata['scaling'][:40]!r}: copy it again") from None

    def read(module: str) -> Loaded:
        parts = {part: weights.whole(found[module][part][0]) for part in needed}
        b = parts["B"].double() + parts["B2"].double() @ parts["B1"].double()
        return Loaded(parts, Update(parts["M"].double() @ parts["A"].double(), b, s))

    shapes = {module: {part: parts[part][1] for part in needed} for module, parts in found.items()}
    return Unit(names, "Fed-ALoRA client, own rank", folder, None, shapes, read)


def _settings(folder: Path) -> dict[str, Any]:
    """The config as it is, or nothing: whoever needs more than a name in it lets `read_adapter` complain."""
    try:
        return read_settings(folder)
    except AdapterFolderError:
        return {}


def _named(base: Any) -> str | None:
    return clean(base) if isinstance(base, str) and base else None
