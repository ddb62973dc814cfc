"""Where a task's matrices are: in a slot of the model's layers, in host memory, or in a file.

`Slots`: every adapted layer holds `capacity` A's in one tensor, and one B that all tasks share. A slot's number is the
task id of a request's tokens. A is allocated once, `[capacity, R, K]` per layer, so its address stays the same for CUDA
graphs and a task comes or goes by copying its own rows. Rows of a free slot are stale and nothing may be routed to
them. Smaller ranks are padded with zero rows, which add nothing; so only the first columns of B have to agree.

`Placement`: the least recently used record makes room and keeps its numbers bit for bit. `TaskStore` locks, not this.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import files
from ..adapters.cards import TaskCard
from ..adapters.config import AdapterFolderError, refused
from ..adapters.reader import AdapterFile, read_adapter
from ..tensor_file import DamagedFileError
from ..text import listed
from ..tuner import ALoRAConfig, ALoRALayer, CheckpointGuard
from ..tuner.base_layer import features
from ..tuner.experts import ALoRAExperts, stacked_sizes
from ..tuner.layer import AdapterSpec, ALoRALinear
from ..tuner.targets import check_target
from .layer import SlotLinear
from .request import StorageError, TaskLostError

log = logging.getLogger("alora_kernels.serving")
Where = Literal["device", "host", "disk"]
Rows = dict[str, Tensor]  # module -> a task's A there: [r, K], r <= R, on the CPU, in the slots' dtype
ADAPTER = "serving"
OWN = "tasks-"  # what a store's folder in `spill` is called
SHOWN = 5  # module names in an error
REMEDY = "give the base that it was trained on"
SAME_B, SAME_B_16BIT = 1e-5, 1e-2  # largest relative difference that is rounding


class Slots:
    """Layers for `capacity` tasks inside a model, in eval mode and without gradients; at first no task is in them.

    The file decides the modules, their `shapes` (N, R, K), scales and B, and the dtype if that is None. If it does not
    fit the model, an AdapterFolderError says why and the model is as it was.
    """

    @torch.inference_mode(False)  # rows are written later, outside of any inference mode the caller may be in
    def __init__(self, model: nn.Module, file: AdapterFile, capacity: int, dtype: torch.dtype | None = None) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("the model has adapters already: give the plain base model")
        check_model(model, file)
        self.model, self.capacity, self.dtype = model, capacity, dtype or file.dtype
        self.shapes, self._scaling, self.base = dict(file.shapes), dict(file.scaling), file.base
        self._b_sums = dict(file.b_sums) if all(sum for _, sum in file.b_sums.values()) else None
        shapes, size = self.shapes.values(), self.dtype.itemsize
        self.bytes_per_task = sum(math.prod(shape.own) for shape in shapes) * size  # in all layers
        self.bytes_shared = sum(math.prod(shape.shared) for shape in shapes) * size  # of the B's, likewise
        self._a: dict[str, nn.Parameter] = {}  # module -> [capacity, R, K]
        self._b: dict[str, nn.Parameter] = {}  # [N, R]
        self._before = (model.training, [p for p in model.parameters() if p.requires_grad])
        try:
            self._inject(file)
        except BaseException:
            self.remove()
            raise

    def _inject(self, file: AdapterFile) -> None:
        # two tasks of rank 1 for PEFT to make its layers with; the tensors are replaced at once
        stacks = sorted(file.config.stacks & self.shapes.keys())
        target = "|".join(re.escape(module) for module in self.shapes if module not in stacks)
        config = ALoRAConfig(r=1, tasks=2, target_modules=target or None, target_parameters=stacks or None)
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, self.model, ADAPTER)
        found = ((n, m) for n, m in self.model.named_modules() if isinstance(m, ALoRALayer))
        layers = {n: m for n, m in found if m.asymlora_spec}
        if layers.keys() != self.shapes.keys():
            raise RuntimeError(f"PEFT adapted other modules than asked for: {_some(layers, self.shapes)}")
        # two names at least: with one, a layer would serve calls that say no task as if they had said this one
        slots = tuple(f"slot{i}" for i in range(max(self.capacity, 2)))
        for module, layer in layers.items():
            shape, device = self.shapes[module], layer.asymlora_A[ADAPTER].weight.device
            a = torch.zeros(self.capacity, *shape.own, dtype=self.dtype, device=device)
            b = _cast(file, module, file.b[module], self.dtype).to(device)
            self._a[module] = layer.asymlora_A[ADAPTER].weight = nn.Parameter(a, requires_grad=False)
            self._b[module] = layer.asymlora_B[ADAPTER].weight = nn.Parameter(b, requires_grad=False)
            layer.asymlora_spec[ADAPTER] = AdapterSpec(shape.r, self._scaling[module], 0.0, slots, self.capacity)
            if type(layer) is ALoRALinear:
                layer.__class__ = SlotLinear  # PEFT has made its own
        self.model.eval().requires_grad_(False)

    def remove(self) -> None:
        """Take the layers out: the model is as it was."""
        kinds = ALoRALinear, ALoRAExperts
        for name, layer in [(n, m) for n, m in self.model.named_modules() if isinstance(m, kinds)]:
            self.model.set_submodule(name, layer.base_layer)
        CheckpointGuard.remove(self.model)
        if "peft_config" in self.model.__dict__:
            del self.model.peft_config
        training, trained = self._before
        self.model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)

    def fit(self, file: AdapterFile) -> None:
        """Raise an AdapterFolderError unless base, modules and shapes of the folder are those of these slots."""
        check_fit(self, file)

    def agree(self, file: AdapterFile) -> None:
        """Raise an AdapterFolderError unless s B is the same: with s and B fixed, A can be used as it is only there."""
        self._check_b(file)
        if not file.copies:
            return
        parameters = self.model.named_parameters(remove_duplicate=False)
        file.check_copies({name.replace(".base_layer.", "."): p for name, p in parameters})

    def _check_b(self, file: AdapterFile) -> None:
        if self._b_sums and (self._b_sums, self.shapes, self._scaling) == (file.b_sums, file.shapes, file.scaling):
            return  # the reader has compared B with its SHA-256
        limit = SAME_B_16BIT if 2 in (file.dtype.itemsize, self.dtype.itemsize) else SAME_B
        different = {}
        for module, b in file.b.items():
            own = self._b[module][..., : b.shape[-1]].to("cpu", torch.float64)
            own, other = own * self._scaling[module], b.to(torch.float64) * file.scaling[module]
            size = max(float(own.abs().max()), float(other.abs().max()), torch.finfo(torch.float64).tiny)
            difference = float((own - other).abs().max()) / size
            if not difference <= limit:  # nan, of an s B that is infinite, is no agreement
                different[module] = difference
        if different:
            where = max(different, key=lambda module: different[module])
            raise refused(
                file.folder,
                f"its B differs from the B that all tasks share (largest relative difference {different[where]:.2g} at"
                f" {where}): several LoRAs with B of their own become one ALoRA with `alora import`",
            )

    def rows(self, file: AdapterFile, task: str) -> Rows:
        """A task's matrices as `write` takes them and `read` gives them, unless the dtype cannot hold them."""
        cast = {module: _cast(file, module, a, self.dtype) for module, a in file.matrices(task).items()}
        short = {module: self.shapes[module].r - a.shape[-2] for module, a in cast.items()}
        return {module: F.pad(a, (0, 0, 0, short[module])) if short[module] else a for module, a in cast.items()}

    @torch.no_grad()
    def write(self, slot: int, matrices: Rows) -> None:
        """Copy a task's matrices into a slot, and zeros into the rows above r.

        All are checked before the first is written; on return the device has them.
        """
        if matrices.keys() != self.shapes.keys():
            raise ValueError(f"matrices are not those of the stack: {_some(matrices, self.shapes)}")
        for module, a in matrices.items():
            *experts, r, k = self.shapes[module].own
            if a.dim() < 2 or [*a.shape[:-2]] != experts or a.shape[-2] > r or a.shape[-1] != k:
                raise ValueError(f"{module}: matrices must be at most {[*experts, r, k]}, got {list(a.shape)}")
        for module, a in matrices.items():
            held = self._a[module][slot]
            held[..., : a.shape[-2], :].copy_(a)
            held[..., a.shape[-2] :, :].zero_()
        for device in {a.device for a in self._a.values()}:
            if device.type == "cuda":  # the engine runs on a stream of its own
                torch.cuda.current_stream(device).synchronize()

    @torch.no_grad()
    def read(self, slot: int) -> Rows:
        """Copies of a slot's matrices, with all R rows."""
        return {module: a[slot].to("cpu", copy=True) for module, a in self._a.items()}


def check_fit(first: Slots | AdapterFile, file: AdapterFile) -> None:
    """Refuse a file with another base, other modules or shapes than the first has, or larger ranks."""
    if file.base and first.base and file.base != first.base:
        raise refused(file.folder, f"was trained on {file.base!r} but this store serves {first.base!r}")
    if file.shapes.keys() != first.shapes.keys():
        raise refused(file.folder, f"does not adapt the modules of the store: {_some(file.shapes, first.shapes)}")
    for module, (n, r, k, *experts) in file.shapes.items():
        own_n, own_r, own_k, *own_experts = first.shapes[module]
        if (n, k) != (own_n, own_k):
            raise refused(file.folder, f"{module} maps {k} features to {n} but the base maps {own_k} to {own_n}")
        if experts != own_experts:
            raise refused(file.folder, f"the experts of {module} share A and B otherwise than those of the store")
        if r > own_r:
            raise refused(file.folder, f"rank {r} does not fit the stack's rank {own_r} at {module}")


def check_model(model: nn.Module, file: AdapterFile) -> None:
    """Refuse a file whose modules the model lacks or has in another shape."""
    modules, stacks = dict(model.named_modules()), {n: s for n, s in file.shapes.items() if n in file.config.stacks}
    missing = [name for name in file.shapes if name not in modules and name not in stacks]
    if missing:
        names = ", ".join(missing[:SHOWN])
        raise refused(file.folder, f"the base has no {names} ({len(missing)} modules missing): {REMEDY}")
    try:
        experts = stacked_sizes(model, list(stacks))
    except ValueError as error:
        raise refused(file.folder, str(error)) from None
    for name, (n, _, k, *own) in stacks.items():
        if (n, k) != experts[name][1:] or not {*own} <= {(), experts[name][:1]}:
            raise refused(file.folder, f"{name} is not of the shape that the base has there: {REMEDY}")
    for name, (n, _, k, *_) in file.shapes.items():
        if name in stacks:
            continue
        try:
            check_target(model, name, tasks=2)
            own_k, own_n = features(modules[name])
        except ValueError as error:
            raise refused(file.folder, str(error)) from None
        if (n, k) != (own_n, own_k):
            raise refused(
                file.folder,
                f"{name} maps {k} features to {n} but the base maps {own_k} to {own_n}: {REMEDY}",
            )
    file.check_copies(dict(model.named_parameters(remove_duplicate=False)))


def _cast(file: AdapterFile, module: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype, unless that makes a number infinite."""
    if tensor.dtype == dtype:  # the reader has looked
        return tensor
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        raise refused(file.folder, f"{module} holds a number too large for {dtype}: use a wider dtype")
    return cast


def _some(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """The first few names that are missing or too many."""
    differing = {"missing": wanted.keys() - found.keys(), "extra": found.keys() - wanted.keys()}
    return "; ".join(f"{title} {listed(sorted(names), SHOWN)}" for title, names in differing.items() if names)


@dataclass(frozen=True)
class TaskInfo:
    """A task as it is now."""

    name: str
    version: int  # grows with every load of the store
    folder: Path  # it was read from
    where: Where
    in_use: int  # running requests that use this version
    bytes: int  # of its A's in all layers
    loaded_at: float  # unix time
    card: TaskCard | None = None  # how it was asked in training, if the folder says


@dataclass(eq=False)
class Record:
    """One version of a task."""

    task: TaskInfo  # as it was loaded
    own: str  # its name in its folder
    leases: int = 0  # requests that wait for it or run
    running: int = 0  # those that run: it keeps its slot
    gone: bool = False  # unloaded or replaced: it goes with its last lease
    slot: int | None = None  # while it is on the device
    rows: Rows | None = None  # while it is in host memory
    file: Path | None = None  # once it was on the disk
    sum: str | None = None  # of its rows, likewise

    def info(self) -> TaskInfo:
        """The task now; `where` is the fastest place that holds it."""
        where: Where = "device" if self.slot is not None else "host" if self.rows is not None else "disk"
        return replace(self.task, where=where, in_use=self.running)

    @property
    def label(self) -> dict[str, str]:
        """The metadata of its file."""
        return {"task": self.task.name, "version": str(self.task.version)}


class Placement:
    """Moves records between the three places; `host` and `spill` as in `TaskStore.open`.

    A record is in a slot, or in host memory, or else in a file. Going to a slot gives up the host's copy, for eviction
    can read the slot; a file stays as long as its record, for the numbers of a record never change: going to the disk a
    second time writes nothing. Where a file was removed or damaged, the folder the task was loaded from is read again.
    """

    def __init__(self, slots: Slots, host: int | None, spill: Path | None) -> None:
        if host is not None and host < 0:
            raise ValueError(f"host must be >= 0, or None for no limit, got {host}")
        self.slots, self.host, self.spill = slots, host, spill
        self._free = list(reversed(range(slots.capacity)))
        self._resident: OrderedDict[Record, None] = OrderedDict()  # least recently used first
        self._waiting: OrderedDict[Record, None] = OrderedDict()  # in host memory, likewise
        self._spilled = ExitStack()  # the folder goes with this, or at exit
        self.close = weakref.finalize(self, self._spilled.close)
        self._folder = None if host is None else self._make_folder()

    def add(self, record: Record, rows: Rows) -> None:
        """Place a new record: in a free slot, else in host memory. It displaces none from the device.

        A StorageError if host memory is full and the disk does not take what would make room.
        """
        if self._free:
            self._write(record, rows)
            return
        record.rows = rows
        self._waiting[record] = None
        self._make_room()

    def bring(self, record: Record) -> bool:
        """Bring a record into a slot, as the one used last; False if running requests use every slot.

        A TaskLostError if its file is damaged, and its folder too; everything else stays where it is.
        """
        if record.slot is not None:
            self._resident.move_to_end(record)
            return True
        victim = None if self._free else next((other for other in self._resident if not other.running), None)
        if not self._free and victim is None:
            return False
        rows = record.rows if record.rows is not None else self._from_disk(record)
        if victim is not None:
            self._evict(victim)
        self._write(record, rows)
        try:
            self._make_room()
        except StorageError as error:  # nothing is lost, and the request can go on
            log.warning("no task can move from host memory to the disk, so more than %s stay: %s", self.host, error)
        return True

    def drop(self, record: Record) -> None:
        """Forget a record that no request uses."""
        if record.slot is not None:
            del self._resident[record]
            self._free.append(record.slot)
            record.slot = None
        self._waiting.pop(record, None)
        record.rows = None
        if record.file is not None:
            try:
                record.file.unlink(missing_ok=True)
            except OSError as error:  # the folder goes as a whole in the end
                log.warning("%s was not removed: %s", record.file, error)
            record.file = None

    def _write(self, record: Record, rows: Rows) -> None:
        self.slots.write(self._free[-1], rows)
        record.slot, record.rows = self._free.pop(), None
        self._waiting.pop(record, None)
        self._resident[record] = None

    def _evict(self, record: Record) -> None:
        assert record.slot is not None
        record.rows = self.slots.read(record.slot)
        self._free.append(record.slot)
        record.slot = None
        del self._resident[record]
        self._waiting[record] = None

    def _make_room(self) -> None:
        """Move the least recently used records from host memory to the disk until the rest is within `host`."""
        while self.close.alive and self.host is not None and len(self._waiting) > self.host:
            record = next(iter(self._waiting))
            if record.file is None or not record.file.is_file():
                self._to_disk(record)
            record.rows = None
            del self._waiting[record]

    def _make_folder(self) -> Path:
        try:
            return self._spilled.enter_context(spill_folder(self.spill or files.state_dir() / "spill"))
        except OSError as error:
            raise StorageError(
                f"no folder for tasks on the disk ({error}): give one with --spill (spill=...) that may be written to"
            ) from None

    def _to_disk(self, record: Record) -> None:
        assert record.rows is not None and self._folder is not None
        if not self._folder.is_dir():  # somebody removed it
            self._spilled.close()  # or its lock would stay open
            self._folder = self._make_folder()
        path = self._folder / f"version-{record.task.version}.safetensors"
        try:
            record.sum = files.write(path, record.rows, record.label)
        except OSError as error:
            raise StorageError(
                f"no room for task {record.task.name!r} in {path.parent} ({error.strerror or error}): free some there,"
                " unload tasks, or start again with another --spill (spill=...) or more --host-tasks (host=...)"
            ) from None
        record.file = path

    def _from_disk(self, record: Record) -> Rows:
        assert record.file is not None
        name, folder = record.task.name, record.task.folder
        try:
            rows, label = files.read(record.file)
            if label == record.label:
                return rows
            why = f"{record.file} holds another task"
        except (OSError, DamagedFileError) as error:
            why = str(error)
        log.warning("task %r was lost on the disk and is read again from %s: %s", name, folder, why)
        try:
            rows = self.slots.rows(read_adapter(folder, fits=self.slots.fit), record.own)
            if files.checksum(rows, record.label) == record.sum:
                with suppress(OSError):
                    record.file.unlink(missing_ok=True)  # it is written anew when it goes there again
                return rows
            why = f"{folder} holds other numbers than were loaded"
        except (OSError, AdapterFolderError) as error:
            why = str(error)
        raise TaskLostError(
            f"task {name!r} was moved to the disk, removed or damaged there, and cannot be read again ({why}): load it"
            " again with replace=True (load_inplace over HTTP)"
        )


@contextmanager
def spill_folder(root: Path) -> Iterator[Path]:
    """A private folder in `root` until the end of the block; first those go that processes which are dead have left."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(root)
    draft = Path(tempfile.mkdtemp(prefix=".new-", dir=root))  # mode 700
    with files.claimed(draft):  # before anybody looks for it
        folder = draft.rename(root / f"{OWN}{draft.name.removeprefix('.new-')}")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Nothing goes of other users, who may have put links there, nor where the file system keeps no locks."""
    for left in root.glob(f"{OWN}*") if os.name == "posix" else ():
        with suppress(ValueError, OSError):  # a ValueError: its process lives
            if left.lstat().st_uid != os.getuid():
                continue
            with files.claimed(left):
                with suppress(ValueError), files.claimed(left):
                    continue  # twice: locks keep nobody out here, so its process may live
                shutil.rmtree(left)
