"""A safetensors file of a stranger: which tensors it has, checked once; later one tensor at a time.

In:   a folder, a file name, a pattern that tells modules and parts.
Out:  `Weights`, and module -> part -> (key, shape).
Who:  `sources`, for the formats that `read_adapter` does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import files
from ..adapters.config import AdapterFolderError, not_finite, refused
from ..adapters.reader import Stamp, stamp_of
from ..tuner.config import unwrapped


class Weights:
    """A safetensors file that was checked, opened again when its numbers are needed."""

    def __init__(self, folder: Path, name: str, stamp: Stamp) -> None:
        self.folder, self.file, self.stamp = folder, name, stamp

    @cached_property
    def _open(self) -> Any:
        path = self.folder / self.file
        if stamp_of(path) != self.stamp:
            raise refused(self.folder, f"{self.file} changed while it was read: start again")
        return safe_open(path, framework="pt")

    def whole(self, key: str) -> Tensor:
        """A copy of a tensor."""
        return self._open.get_tensor(key).clone()  # type: ignore[no-any-return]

    def row(self, key: str, row: int) -> Tensor:
        """A copy of one task's slice."""
        return self._open.get_slice(key)[row].clone()  # type: ignore[no-any-return]


Found = dict[str, dict[str, tuple[str, tuple[int, ...]]]]  # module -> part -> (key, shape)


def matched(
    folder: Path,
    name: str,
    pattern: re.Pattern[str],
    dimensions: Mapping[str, tuple[int, ...]],
    rename: Mapping[str, str] | None = None,
    *,
    checksum: bool = False,
) -> tuple[Weights, Found, dict[str, str]]:
    """The tensors whose names match, by module and part; others (heads, frozen projections) are left alone.

    Args:
        folder, name: the file.
        pattern: its groups are the module and the part.
        dimensions: part -> how many it may have.
        rename: part in the file -> part.
        checksum: whether `atomic` wrote the file.

    Returns:
        The file, what it has, its metadata (with `checksum`).

    Raises:
        AdapterFolderError: does not read, nothing matches, wrong dimensions, NaN or infinity.
    """
    path, found, bad = folder / name, Found(), list[str]()
    try:
        stamp = stamp_of(path)
        metadata = files.read(path)[1] if checksum else {}
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                match = pattern.fullmatch(unwrapped(key)) if key.isprintable() else None
                if match is None:
                    continue
                tensor, part = file.get_tensor(key), (rename or {}).get(match[2], match[2])
                if tensor.dim() not in dimensions[part] or tensor.numel() == 0 or not tensor.is_floating_point():
                    raise refused(folder, f"{match[1]}: {part} has shape {list(tensor.shape)} of {tensor.dtype}, which"
                                  " is not what it must be: copy the file again")  # fmt: skip
                if not bool(tensor.isfinite().all()):
                    bad.append(f"{part} of {match[1]}")
                found.setdefault(match[1], {})[part] = (key, tuple(tensor.shape))
    except AdapterFolderError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise refused(folder, f"{name} does not read ({error}): it is cut short or damaged; copy it again") from None
    if bad:
        raise not_finite(folder, bad)
    if not found:
        raise refused(folder, f"{name} holds nothing that can be compared: is it the right folder?")
    return Weights(folder, name, stamp), found, metadata
