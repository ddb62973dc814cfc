"""What travels: the fixed set of arrays both sides agree on, and the names of the records around it.

A message to a client holds one ArrayRecord `arrays` and one ConfigRecord `config`; a reply holds `arrays`, one
MetricRecord `metrics` and a ConfigRecord `reply`. Client, server and guard build and read them here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

ARRAYS, CONFIG, METRICS, REPLY = "arrays", "config", "metrics", "reply"  # records of a message
ROUND, RUN, SPEC, NONCE = "server-round", "run", "spec-hash", "nonce"  # in `config`; the last two come back in `reply`
METHOD, BASE, SCALING, LAST = "method", "base", "scaling", "last"  # in `config`, from the server
CLIENT, SECONDS, EXAMPLES = "client", "seconds", "num-examples"
BEFORE, AFTER = "before-", "after-"  # prefixes of a metric measured before and after local training
MEASURED = {"train": {"before": BEFORE, "after": AFTER}, "evaluate": {"metrics": ""}}  # kind -> in the ledger -> prefix
LEFT, RIGHT = ".left", ".right"
NUMPY_HEADER = 1024  # bytes a serialised array may have beyond its numbers

NDArrays = Mapping[str, NDArray]


class WireError(ValueError):
    """A record that is not what both sides agreed on; the message says which key and why."""


@dataclass(frozen=True)
class WireSpec:
    """What client and server must agree on before arrays are averaged."""

    method: str
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]  # key -> (dtype, shape) of everything that travels
    base: str  # fingerprint of the frozen model, see `model.fingerprint`
    scaling: float  # s, because equal arrays must mean equal functions
    seed: int  # from which frozen and shared parts begin
    metrics: tuple[str, ...]  # names every client reports, before and after local training

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all fields, in hexadecimal."""
        fields = [self.method, sorted(self.arrays.items()), self.base, self.scaling, self.seed, self.metrics]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    def metric_keys(self, kind: str) -> set[str]:
        """Keys of the MetricRecord of a reply, to a "train" or an "evaluate" message."""
        return {EXAMPLES, *(prefix + name for prefix in MEASURED[kind].values() for name in self.metrics)}


def finite(value: object) -> bool:
    """Whether it is one finite number."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return False


def not_finite(arrays: NDArrays) -> str | None:
    """The key of the first array with NaN or infinity."""
    return next((key for key, values in arrays.items() if not np.isfinite(values).all()), None)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of the numbers of an array, without its header."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def to_record(arrays: Mapping[str, Any]) -> ArrayRecord:
    """Arrays, or tensors on the CPU, as a Flower record, keys sorted."""
    return ArrayRecord({key: Array(np.asarray(arrays[key], order="C")) for key in sorted(arrays)})


def decode(key: str, array: Array, dtype: str, shape: tuple[int, ...]) -> NDArray:
    """One array as agreed, or WireError; looked at before its bytes are decoded and after: a declared shape may lie."""
    if array.dtype != dtype:
        raise WireError(f"{key} has dtype {array.dtype}, agreed is {dtype}")
    if tuple(array.shape) != shape:
        raise WireError(f"{key} has shape {tuple(array.shape)}, agreed is {shape}")
    if len(array.data) > nbytes(dtype, shape) + NUMPY_HEADER:
        raise WireError(f"{key} has {len(array.data)} bytes, agreed are {nbytes(dtype, shape)}")
    try:
        values = array.numpy()
    except (TypeError, ValueError, OSError, EOFError, MemoryError) as error:
        raise WireError(f"{key} does not decode: {error}") from None
    if not isinstance(values, np.ndarray):
        raise WireError(f"{key} is an archive, not one array")
    if values.dtype != np.dtype(dtype) or values.shape != shape:
        raise WireError(f"{key} decodes to {values.dtype} {values.shape}, agreed is {dtype} {shape}")
    return values


def check_keys(got: set[str], agreed: set[str], what: str = "keys") -> None:
    """Refuse a record whose keys are not those agreed on; the WireError names up to three on each side."""
    if got != agreed:
        extra, missing = sorted(got - agreed)[:3], sorted(agreed - got)[:3]
        raise WireError(f"{what} differ: unexpected {extra or 'none'}, missing {missing or 'none'}")


def from_record(record: ArrayRecord, spec: WireSpec) -> dict[str, NDArray]:
    """The arrays of a message to a client; WireError for keys, dtypes or shapes that are not the spec's."""
    check_keys(set(record), set(spec.arrays))
    return {key: decode(key, record[key], *spec.arrays[key]) for key in record}


def expand(record: ArrayRecord, spec: WireSpec, sent: NDArrays) -> tuple[ArrayRecord, NDArrays]:
    """The arrays of a reply, one for each key of the spec: a record to hand on, and its numbers to look at.

    Formula: `value = sent + left right` where unequal-rank Fed-ALoRA gives two factors, `<key>.left [N, r]` and
    `<key>.right [r, d_m]`, `sent` being what the client got: fewer bytes when the rank is small, the same numbers. What
    came whole is handed on as it came. WireError if keys, dtypes, shapes or ranks do not fit.
    """
    factored = {key for key in spec.arrays if key + LEFT in record}
    factors = {key + side for key in factored for side in (LEFT, RIGHT)}
    check_keys(set(record), set(spec.arrays) - factored | factors)
    arrays = {
        key: _product(key, record, spec, sent) if key in factored else decode(key, record[key], *agreed)
        for key, agreed in spec.arrays.items()
    }
    whole = {key: Array(arrays[key]) if key in factored else record[key] for key in sorted(arrays)}
    return ArrayRecord(whole), arrays


def _product(key: str, record: ArrayRecord, spec: WireSpec, sent: NDArrays) -> NDArray:
    dtype, shape = spec.arrays[key]
    declared = tuple(record[key + LEFT].shape)
    if len(shape) != 2 or len(declared) != 2 or not 1 <= declared[1] <= min(shape):
        raise WireError(f"{key} is given as factors of shape {declared}, which do not fit {shape}")
    rank = declared[1]
    left = decode(key + LEFT, record[key + LEFT], dtype, (shape[0], rank))
    right = decode(key + RIGHT, record[key + RIGHT], dtype, (rank, shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):  # a bad client's numbers; the guard looks at the result
        return np.asarray(sent[key] + left @ right, dtype=dtype)
