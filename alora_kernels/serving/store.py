"""Tasks by name: adapter folders that share one B are loaded and unloaded while requests run.

A request leases the version of its task that is there when it is submitted, and later a slot, whose rows do not change
until the lease is released. A load makes a new version with rows of its own; an old one is freed with its last lease.
Everything is checked before a name points to it, so a refused load changes nothing. Folders are read outside the lock,
so requests go on.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..adapters.cards import TaskCard, read_task_cards
from ..adapters.config import AdapterFolderError, refused
from ..adapters.reader import AdapterChangedError, AdapterFile, read_adapter
from ..modules.adapter import BASE
from .openmp import release_workers
from .request import AdapterRefusedError, NotServingError, UnknownTaskError
from .slots import Placement, Record, Slots, TaskInfo, check_fit, check_model

SHOWN = 20  # names in an error
READERS = 2  # folders that are read at once when a store is opened
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")  # what clients send as the model: nothing that needs quoting


@dataclass(eq=False)  # two leases of one version are two leases
class Lease:
    """One request's right to a version of a task, and once it is placed to a slot, which its tokens are routed to."""

    name: str
    version: int
    card: TaskCard | None = None
    slot: int | None = None


class TaskStore:
    """The tasks that a model can serve. Made by `open`; every method may be called from any thread."""

    def __init__(self, slots: Slots, *, host: int | None = None, spill: Path | None = None) -> None:
        self.slots = slots
        self.bytes_per_task = slots.bytes_per_task  # of one task's A's in all layers
        self.bytes_shared = slots.bytes_shared  # of the B's, held once for all tasks
        self._lock = threading.RLock()
        self._placement = Placement(slots, host, spill)
        self._records: dict[str, Record] = {}
        self._leases: dict[Lease, Record] = {}
        self._versions, self._closed = 0, False

    @classmethod
    def open(
        cls,
        base_model: nn.Module,
        folders: Sequence[Path],
        *,
        resident: int = 64,
        host: int | None = None,
        spill: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> TaskStore:
        """Put adapter layers into the model and load every task of every folder.

        Args:
            base_model: without adapters; changed in place.
            folders: adapters, the first of which decides modules, rank, scale and B.
            resident: tasks on the device at most; the memory for them is taken now.
            host: further tasks in host memory at most; None is no limit.
            spill: tasks beyond that go to a private folder made in this one; None takes `files.state_dir()`.
            dtype: of A and B on the device; None takes the first folder's.

        Raises:
            ValueError: no folder, a number out of range, or a model that has adapters.
            StorageError: `host` is a limit and no folder can be made in `spill`.
            AdapterRefusedError: a folder that cannot be served; the model is as it was.

        Example:
            >>> store = TaskStore.open(base_model, [Path("runs/demo/adapter")], resident=256)
        """
        if not folders:
            raise ValueError("folders must name at least one adapter: the first decides which modules are adapted")
        if resident < 1:
            raise ValueError(f"resident must be >= 1, got {resident}")
        with ThreadPoolExecutor(READERS) as readers, ExitStack() as undo:
            undo.callback(readers.shutdown, wait=False, cancel_futures=True)
            with _reading():
                first = read_adapter(folders[0], fits=partial(check_model, base_model))
                others = [(folder, readers.submit(_read, folder, first)) for folder in folders[1:]]
                slots = Slots(base_model, first, resident, dtype)
                undo.callback(slots.remove)
                store = cls(slots, host=host, spill=spill)
                undo.callback(store.close)
                store._load(first, None, None, replace=False)
            for folder, file in others:
                store._load_from(folder, file.result, None, None, replace=False)
            undo.pop_all()
        return store

    def load(
        self, folder: Path, *, name: str | None = None, task: str | None = None, replace: bool = False
    ) -> list[TaskInfo]:
        """Load the tasks of a folder under their own names, or one of them under a name of choice.

        Args:
            folder: an adapter with this store's B.
            name: load one task, under this name: the folder's only one, or the one called `task`, or else the one
                called `name`.
            task: load this one only.
            replace: a name that exists gets the new version; requests that run keep the old one.

        Raises:
            AdapterRefusedError: the folder cannot be served, a name is not allowed or taken; nothing has changed.
            NotServingError: the store is closed.
            StorageError: a task has to move to the disk and it does not take it; nothing has changed.
        """
        return self._load_from(folder, partial(read_adapter, folder, fits=self.slots.fit), name, task, replace)

    def _load_from(
        self, folder: Path, read: Callable[[], AdapterFile], name: str | None, task: str | None, replace: bool
    ) -> list[TaskInfo]:
        with _reading():
            try:
                return self._load(read(), name, task, replace)
            except AdapterChangedError:  # somebody writes it anew
                return self._load(read_adapter(folder, fits=self.slots.fit), name, task, replace)

    def _load(self, file: AdapterFile, name: str | None, task: str | None, replace: bool) -> list[TaskInfo]:
        self.slots.agree(file)
        pairs = _chosen(file, name, task)
        names, cards = [public for public, _ in pairs], read_task_cards(file.folder, file.tasks)
        with self._lock:
            self._check_names(file, names, replace)
        records: list[Record] = []
        try:
            for public, own in pairs:
                rows = self.slots.rows(file, own)
                with self._lock:
                    self._check_names(file, names, replace)  # another thread may have been faster, or closed the store
                    self._versions += 1
                    size, now, card = self.bytes_per_task, time.time(), cards.get(own)
                    info = TaskInfo(public, self._versions, file.folder, "host", 0, size, now, card)
                    records.append(Record(info, own))
                    self._placement.add(records[-1], rows)
            with self._lock:
                self._check_names(file, names, replace)
                for record in records:
                    old = self._records.get(record.task.name)
                    self._records[record.task.name] = record
                    if old is not None:
                        self._retire(old)
                return [record.info() for record in records]
        except BaseException:
            with self._lock:
                for record in records:
                    if self._records.get(record.task.name) is not record:
                        self._placement.drop(record)
            raise

    def unload(self, name: str) -> TaskInfo:
        """Forget a task and say what it was, or raise an UnknownTaskError; its rows go with the last that uses them."""
        with self._lock:
            info = self._known(name).info()
            self._retire(self._records.pop(name))
            return info

    def tasks(self) -> list[TaskInfo]:
        """All tasks, in the order of their first load."""
        with self._lock:
            return [record.info() for record in self._records.values()]

    def info(self, name: str) -> TaskInfo:
        """One task, or an UnknownTaskError."""
        with self._lock:
            return self._known(name).info()

    def names(self) -> list[str]:
        """The names of all tasks, in the order of their first load; does not wait for rows that move."""
        return list(self._records)

    def resident(self) -> int:
        """How many of the tasks are on the device; does not wait, either."""
        return sum(record.slot is not None for record in list(self._records.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def reserve(self, name: str) -> Lease:
        """The task as it is now, until `release`, whatever is loaded or unloaded meanwhile; or an UnknownTaskError."""
        with self._lock:
            record = self._known(name)
            lease = Lease(name, record.task.version, record.task.card)
            self._leases[lease] = record
            record.leases += 1
            return lease

    def place(self, lease: Lease) -> bool:
        """Give a lease a slot with its rows, which stay until `release`; False while running requests use every slot.

        A task that is not on the device takes a free slot, or that of the task whose last use is longest ago among
        those that no running request uses. Does nothing for a lease that has a slot, or was released.

        Raises:
            TaskLostError: its file on the disk is gone or damaged, and its folder is not what was loaded; the task
                stays, so that it can be replaced.
        """
        with self._lock:
            record = self._leases.get(lease)
            if record is None or lease.slot is not None:
                return True
            if not self._placement.bring(record):
                return False
            lease.slot = record.slot
            record.running += 1
            return True

    def acquire(self, name: str) -> Lease | None:
        """`reserve` and `place`; None while running requests use every slot."""
        lease = self.reserve(name)
        try:
            placed = self.place(lease)
        except BaseException:
            self.release(lease)
            raise
        if not placed:
            self.release(lease)
        return lease if placed else None

    def release(self, lease: Lease) -> None:
        """Give a lease back; a second time changes nothing."""
        with self._lock:
            record = self._leases.pop(lease, None)
            if record is None:
                return
            record.leases -= 1
            record.running -= lease.slot is not None
            if record.gone and not record.leases:
                self._placement.drop(record)

    def close(self) -> None:
        """Forget every task and remove the files; leases stay good until they are released."""
        with self._lock:
            self._closed = True
            for name in list(self._records):
                self._retire(self._records.pop(name))
            self._placement.close()

    def __enter__(self) -> TaskStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _known(self, name: str) -> Record:
        record = self._records.get(name)
        if record is None:
            raise UnknownTaskError(name, list(self._records))
        return record

    def _retire(self, record: Record) -> None:
        record.gone = True
        if not record.leases:
            self._placement.drop(record)

    def _check_names(self, file: AdapterFile, names: Sequence[str], replace: bool) -> None:
        if self._closed:
            raise NotServingError("the store is closed: open another")
        taken = [name for name in names if name in self._records]
        if taken and not replace:
            raise refused(
                file.folder,
                f"a task is called {taken[0]!r} already: give name=... (lora_name over HTTP) for another name, or"
                " replace=True (load_inplace) for a new version of it",
            )


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what the reader and the slots refuse of a folder into an error of serving; no worker is left spinning."""
    try:
        yield
    except AdapterFolderError as error:
        raise AdapterRefusedError(str(error)) from None
    finally:
        release_workers()


def _read(folder: Path, first: AdapterFile) -> AdapterFile:
    """In a thread of its own: most of the time is spent in hashes and numbers, which others need not wait for."""
    try:
        return read_adapter(folder, fits=partial(check_fit, first))
    finally:
        release_workers()


def _chosen(file: AdapterFile, name: str | None, task: str | None) -> list[tuple[str, str]]:
    """(name in the store, name in the file) of what is to be loaded; `name` and `task` as in `TaskStore.load`."""
    if task is None and name is not None:
        task = file.tasks[0] if len(file.tasks) == 1 else name
    if task is not None and task not in file.tasks:
        listed = ", ".join(map(repr, file.tasks[:SHOWN])) + (" and more" if len(file.tasks) > SHOWN else "")
        raise refused(file.folder, f"has no task {task[:140]!r}: it has {listed}; say which with task=...")
    pairs = [(own, own) for own in file.tasks] if task is None else [(task if name is None else name, task)]
    for public, own in pairs:
        if public == BASE or not NAME.fullmatch(public):
            allowed = re.sub(r"[^A-Za-z0-9._:-]+", "-", own).strip("._:-")[:128] or "task"
            raise refused(
                file.folder,
                f"a task cannot be called {public[:140]!r}: names are 1 to 128 letters, digits, '.', '_', ':' or '-'"
                f" and begin with a letter or digit; load it with task={own!r} and another name, such as"
                f" name={allowed!r} (lora_name over HTTP), or give it one with `alora export`",
            )
    return pairs
