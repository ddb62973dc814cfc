"""Folders that are built once and kept: whole or not at all.

In:   a folder name and a function that fills an empty folder.
Out:  the finished folder under the user's cache.
Who:  `convert`, for the converted model and its tokenizer.

The function writes into a temporary folder beside the target, which is renamed when complete; a rename within one
file system is atomic, so a reader never sees a half-written model. A lock lets the second of two processes wait
for the first instead of converting as well; whoever holds it may also sweep away what a killed process left.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/alora-kernels`, or `~/.cache/alora-kernels` where the variable is unset or not absolute."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "alora-kernels"


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`, built by `build` if it is not there yet.

    Args:
        name: folder name under `cache_dir()`; holds every version the content depends on.
        build: fills the empty folder it is given. If it raises, nothing is kept.

    Returns:
        Path of the finished folder.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target

    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        if target.is_dir():  # another process built it while this one waited
            return target
        prefix = f".{name}.partial-"
        for left_over in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            build(partial)
            os.rename(partial, target)
        except BaseException:  # an interrupt too must leave nothing behind
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target
