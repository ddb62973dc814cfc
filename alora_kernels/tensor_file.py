"""Safetensors files that may come from anybody, and that somebody may write into while they are read.

A file is read piece by piece through one descriptor and never mapped: a mapped file that is cut short ends the process.
Its header is checked before any number is read. `sums` are SHA-256 of tensors, which writers put into the metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

SUMS = "sha256"  # key of the metadata
MAX_HEADER = 100 << 20  # bytes, as safetensors itself allows
PIECE = 16 << 20  # bytes that are read at a time
SETTLED = 0.02  # seconds; file systems count time in ticks of some milliseconds, in which a file may change twice
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class DamagedFileError(ValueError):
    """A file that is cut short, changed, or not one of ours."""


class ChangedFileError(DamagedFileError):
    """A file that somebody wrote into while it was read."""


class Stamp(NamedTuple):
    """Which file it is: another one under the same name differs in one of these."""

    inode: int
    bytes: int
    changed: int


class Place(NamedTuple):
    """Where a tensor is in the file, from the end of the header on; its dtype in the words of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    stop: int


class TensorFile:
    """One file, open; a DamagedFileError if it is no safetensors file, or another than its header says.

    The end of the block is a ChangedFileError if somebody wrote into it meanwhile: what was read may be of two files.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("rb", buffering=0)
        try:
            age = time.time() - os.fstat(self._file.fileno()).st_mtime
            if 0 <= age < SETTLED:
                time.sleep(SETTLED - age)
            self.stamp = self._stamp()
            length = int.from_bytes(self._bytes(0, min(8, self.stamp.bytes)), "little")
            if not 2 <= length <= min(MAX_HEADER, self.stamp.bytes - 8):
                raise DamagedFileError(f"{path} is cut short, or no safetensors file: its header has {length} bytes")
            self.metadata, self._places = _header(path, self._bytes(8, length), self.stamp.bytes - 8 - length)
            self._start = 8 + length
        except BaseException:
            self._file.close()
            raise

    def _stamp(self) -> Stamp:
        stat = os.fstat(self._file.fileno())
        return Stamp(stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _bytes(self, at: int, size: int) -> bytearray:
        buffer, done = bytearray(size), 0
        self._file.seek(at)
        while done < size:
            if not (some := self._file.readinto(memoryview(buffer)[done:])):
                raise ChangedFileError(f"{self.path} is cut short, {size - done} bytes before the end of a tensor")
            done += some
        return buffer

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor; nothing is read."""
        return self._places[key].shape

    def dtype(self, key: str) -> str:
        """Of a tensor, in the words of the file, such as BF16; nothing is read."""
        return self._places[key].dtype

    def read(self, key: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of its first axis alone; it shares no memory with the file."""
        _, shape, begin, stop = self._places[key]
        if row is None:
            return self._tensor(key, begin, stop).view(shape)
        size = (stop - begin) // shape[0]
        return self._tensor(key, begin + row * size, begin + (row + 1) * size).view(shape[1:])

    def pieces(self, key: str) -> Iterator[Tensor]:
        """A tensor's numbers, flat and in order, some at a time: what is larger than memory can be looked at."""
        _, _, begin, stop = self._places[key]
        for at in range(begin, stop, PIECE):
            yield self._tensor(key, at, min(at + PIECE, stop))

    def finite(self, key: str) -> bool:
        """Whether a tensor holds numbers only; a DamagedFileError unless it has the SHA-256 it was written with."""
        digest, good = hashlib.sha256(), True
        for piece in self.pieces(key):
            digest.update(piece.view(torch.uint8).numpy().data)
            good &= bool(piece.isfinite().all())
        if self.sums.get(key, digest.hexdigest()) != digest.hexdigest():
            raise DamagedFileError(f"{key} does not have the SHA-256 it was written with: a bit has changed")
        return good

    @cached_property
    def sums(self) -> Mapping[str, Any]:
        """SHA-256 of the tensors as they were written, of files whose writer says them."""
        try:
            found = json.loads(self.metadata.get(SUMS, "{}"))
        except (ValueError, RecursionError):
            found = None
        return found if isinstance(found, dict) else {}

    def _tensor(self, key: str, begin: int, stop: int) -> Tensor:
        dtype = DTYPES.get(self._places[key].dtype)
        if dtype is None:
            raise DamagedFileError(f"{key} is stored as {self._places[key].dtype}, which is not known here")
        if begin == stop:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._bytes(self._start + begin, stop - begin), dtype=dtype)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._stamp() != self.stamp:
                raise ChangedFileError(f"{self.path} changed while it was read")
        finally:
            self._file.close()


def _header(path: Path, text: bytearray, size: int) -> tuple[dict[str, str], dict[str, Place]]:
    """Metadata and places of a header, whose tensors must fill the rest of the file, `size` bytes, without a gap."""
    try:
        header: dict[str, Any] = json.loads(bytes(text))
        metadata = header.pop("__metadata__", {})
        places = {name: Place(t["dtype"], (*t["shape"],), *t["data_offsets"]) for name, t in header.items()}
        numbers = [n for place in places.values() for n in (*place.shape, place.begin, place.stop)]
        words = [*metadata.keys(), *metadata.values(), *(place.dtype for place in places.values())]
        if not all(type(n) is int and n >= 0 for n in numbers) or not all(isinstance(word, str) for word in words):
            raise ValueError("not what a header must hold")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{path} has a header that does not read ({str(error)[:80]})") from None
    end = 0
    for dtype, shape, begin, stop in sorted(places.values(), key=lambda place: (place.begin, place.stop)):
        known = DTYPES.get(dtype)
        if begin != end or stop < begin or (known and stop - begin != math.prod(shape) * known.itemsize):
            raise DamagedFileError(f"{path} has a header whose tensors overlap, leave gaps or have other sizes")
        end = stop
    if end != size:
        raise DamagedFileError(f"{path} is cut short or damaged: {size} bytes of numbers, {end} in its header")
    return metadata, places


def verify(path: Path) -> None:
    """A DamagedFileError if a tensor does not have the SHA-256 it was written with; files without any pass."""
    with TensorFile(path) as file:
        if missing := [key for key in file.sums if key not in file.keys()]:  # noqa: SIM118, not a dict
            raise DamagedFileError(f"{missing[0]} is gone, which it was written with")
        for key in file.sums:
            file.finite(key)


def sums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The entry of a file's metadata that lets readers find a changed bit."""
    flat = {name: tensor.detach().to("cpu").contiguous().flatten() for name, tensor in tensors.items()}
    found = {name: hashlib.sha256(t.view(torch.uint8).numpy().data).hexdigest() for name, t in flat.items()}
    return {SUMS: json.dumps(found, separators=(",", ":"))}


def in_order(path: Path) -> None:
    """Put a file's metadata in order: safetensors draws one anew each time, and equal adapters would differ."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
