"""Where a task's matrices are: in a slot of the model, in host memory, or in a file. `TaskStore` locks, not this.

The least recently used record makes room and keeps its numbers bit for bit. A record is in exactly one of slot and host
memory, or in neither and then in a file. Going to a slot gives up the host's copy, for eviction can read the slot; a
file stays as long as its record, because the numbers of a record never change: going to the disk a second time writes
nothing.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from .. import files
from ..adapters.cards import TaskCard
from .errors import AdapterRefusedError
from .slots import Slots

log = logging.getLogger("alora_kernels.serving")
Where = Literal["device", "host", "disk"]
Rows = dict[str, Tensor]


@dataclass(eq=False)
class Record:
    """One version of a task."""

    name: str
    version: int  # unlike that of any other record of the store
    folder: Path
    loaded_at: float
    card: TaskCard | None = None
    leases: int = 0  # running requests that use it
    gone: bool = False  # unloaded or replaced: it goes with its last lease
    slot: int | None = None  # while it is on the device
    rows: Rows | None = None  # while it is in host memory
    file: Path | None = None  # once it was on the disk

    @property
    def where(self) -> Where:
        """The fastest place that holds it."""
        if self.slot is not None:
            return "device"
        return "host" if self.rows is not None else "disk"

    @property
    def label(self) -> dict[str, str]:
        """The metadata of its file."""
        return {"task": self.name, "version": str(self.version)}


class Placement:
    """Moves records between the three places; `host` and `spill` as in `TaskStore.open`."""

    def __init__(self, slots: Slots, host: int | None, spill: Path | None) -> None:
        if host is not None and host < 0:
            raise ValueError(f"host must be >= 0, or None for no limit, got {host}")
        self.slots, self.host, self.spill = slots, host, spill
        self._free = list(reversed(range(slots.capacity)))
        self._resident: OrderedDict[Record, None] = OrderedDict()  # least recently used first
        self._waiting: OrderedDict[Record, None] = OrderedDict()  # in host memory, likewise
        self._folder: Path | None = None
        self._remove: weakref.finalize | None = None

    def add(self, record: Record, rows: Rows) -> None:
        """Place a new record: in a free slot, else in host memory. It displaces none from the device.

        An OSError if host memory is full and the disk does not take what would make room.
        """
        if self._free:
            self._write(record, rows)
            return
        record.rows = rows
        self._waiting[record] = None
        self._make_room()

    def bring(self, record: Record) -> bool:
        """Bring a record into a slot, as the one used last; False if running requests use every slot.

        An AdapterRefusedError if its file is damaged; everything else stays where it is.
        """
        if record.slot is not None:
            self._resident.move_to_end(record)
            return True
        victim = None if self._free else next((other for other in self._resident if not other.leases), None)
        if not self._free and victim is None:
            return False
        rows = record.rows if record.rows is not None else self._from_disk(record)
        if victim is not None:
            self._evict(victim)
        self._write(record, rows)
        try:
            self._make_room()
        except OSError as error:  # nothing is lost, and the request can go on
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

    def close(self) -> None:
        """Remove the files."""
        if self._remove is not None:
            self._remove()

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
        while self.host is not None and len(self._waiting) > self.host:
            record = next(iter(self._waiting))
            if record.file is None:
                self._to_disk(record)
            record.rows = None
            del self._waiting[record]

    def _to_disk(self, record: Record) -> None:
        assert record.rows is not None
        if self._folder is None:
            if self.spill is not None:
                self.spill.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder = Path(tempfile.mkdtemp(prefix="alora-tasks-", dir=self.spill))  # mode 700
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # at exit, or before
        path = self._folder / f"version-{record.version}.safetensors"
        files.write(path, record.rows, record.label)
        record.file = path

    def _from_disk(self, record: Record) -> Rows:
        assert record.file is not None
        try:
            rows, label = files.read(record.file)
            if label != record.label:
                raise files.DamagedFileError(f"{record.file} holds another task")
        except (OSError, files.DamagedFileError) as error:
            raise AdapterRefusedError(
                f"task {record.name!r} was moved to the disk and does not come back ({error}): load {record.folder}"
                " again with replace=True"
            ) from None
        return rows
