"""Files that are whole or absent, whatever kills the process or fills the disk.

`write` and `read` are for arrays: the federated client's state, the server's checkpoint, serving's tasks on disk.
`replacing` is for files of other kinds, `written_whole` for an adapter folder, `kept` around a change of one,
`claimed` keeps a second process out.

A file of arrays is written under a name of its own in the same folder, flushed to the disk, renamed over the final
name, and the folder is flushed: a reader sees the old file or the new one. Safetensors notices a file cut short but
not a changed number, hence the SHA-256. Files get mode 600: all kinds are somebody's secret.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as to_bytes
from torch import Tensor

from .tensor_file import DamagedFileError, TensorFile, in_order

CHECKSUM, LOCK = "sha256", ".lock"
ABANDONED = 3600.0  # seconds; a write takes a few, so an older temporary file belongs to a killed process


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/alora-kernels`, or `~/.cache/alora-kernels` where the variable is unset or not absolute."""
    return _own_dir("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """`$XDG_STATE_HOME/alora-kernels`, or `~/.local/state/alora-kernels`, likewise."""
    return _own_dir("XDG_STATE_HOME", ".local/state")


def _own_dir(variable: str, default: str) -> Path:
    root = Path(os.environ.get(variable, ""))
    return (root if root.is_absolute() else Path.home() / default) / "alora-kernels"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """No other process writes into the folder during the block; a ValueError says which one does already.

    The lock ends with its process, however that ends; the empty file `.lock` stays, but not in a folder that was made
    for a block which failed before it wrote. Without such locks (Windows, some network file systems) none is kept out.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="ascii") as file:
        if not _locked(file):
            file.seek(0)
            raise ValueError(
                f"process {file.read(20) or 'unknown'} is writing into {folder}: wait for its end, stop it, or choose"
                " another output folder"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if new and [*folder.iterdir()] == [folder / LOCK]:
                shutil.rmtree(folder)


def _locked(file: IO[str]) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, which takes the place of `path` at the end of the block; after an error nothing has changed."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def written_whole(folder: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary folder to write into; its files replace those in `folder` if the block ends well, else nothing does.

    Files are renamed one by one, weights before config, within one file system: only there is a rename atomic.
    """
    final = Path(folder).resolve()
    if final.is_file():
        raise ValueError(f"{folder} is a file: give the path of a folder")
    final.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=final))
    try:
        yield str(temporary)
        written = sorted((p for p in temporary.rglob("*") if p.is_file()), key=_rank)
        for path in written:
            _sync(path)
        for path in written:
            target = final / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        _sync(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Put the files of a folder into `.before` until the block ends well: a crash between two renames loses nothing.

    A ValueError where there was one, until somebody has looked.
    """
    before = folder / ".before"
    if before.exists():
        raise ValueError(
            f"{before} holds what {folder} was before a change that did not end: put its files back if {folder} does"
            " not read, then delete it"
        )
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    before.mkdir(parents=True)
    for path in files:
        shutil.copy2(path, before)
    yield
    shutil.rmtree(before)


def _rank(path: Path) -> tuple[int, str]:
    """Weights first, the config last: a config never describes weights that are not there yet."""
    return 0 if path.suffix == ".safetensors" else 2 if path.name == "adapter_config.json" else 1, str(path)


def own_copy(key: str, value: NDArray | Tensor) -> Tensor:
    """A contiguous tensor on the CPU that shares memory with nothing; a TypeError for a dtype that torch has not."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    array = np.array(value, order="C")  # np.ascontiguousarray would make [] to [1]
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(f"{key} has dtype {array.dtype}, which cannot be stored: {error}") from None


def write(path: Path, arrays: Mapping[str, NDArray | Tensor], metadata: Mapping[str, str]) -> str:
    """Write the file, replacing what was there, or leave everything as it was; its folder is made. Its `checksum`."""
    tensors = {key: own_copy(key, value) for key, value in arrays.items()}
    found = checksum(tensors, metadata)
    data = to_bytes(tensors, {**metadata, CHECKSUM: found})
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            in_order(Path(name))
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)
    return found


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Arrays and metadata of a file that `write` made; a DamagedFileError if it is cut short, changed, or another's."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with TensorFile(path) as file:
            metadata, tensors = dict(file.metadata), {key: file.read(key) for key in file.keys()}  # noqa: SIM118
    except ValueError as error:
        raise DamagedFileError(f"{path} does not read: {error}") from None
    if metadata.pop(CHECKSUM, None) != checksum(tensors, metadata):
        raise DamagedFileError(f"{path} does not have the checksum it was written with")
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of arrays and metadata, in whatever order."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1e".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)  # flatten: a view of [] as bytes is refused
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Put a file, or the renames in a folder, on the disk; where a folder cannot be opened, the rename has to do."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed left behind."""
    for left in folder.glob(".*.tmp"):
        try:
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
        except FileNotFoundError:
            continue
