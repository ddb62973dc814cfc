"""Products with a frozen weight on a CPU, whose weight is laid out once as the library multiplies it fastest.

A step of decoding reads every weight from memory once, and `F.linear` lays it out anew each time: for 16 rows packed
weights take three quarters of the time; for 800 rows 0.95 (LOG.md). A copy is as large as its weight, made when few
rows first meet it, and gone with it. `ALORA_PACK_ROWS`, read at import, says how many rows are few: 0 never packs.

On Intel's chips MKL packs float32, as exact as `F.linear`; oneDNN, which packs everything else, gains nothing there:
210 weights that are not in the cache and 16 rows take 78 ms with `F.linear`, 78 with oneDNN, 58 with MKL (Ice Lake).

More rows of bf16 are multiplied in float32 where that is faster, a block of rows and, for the call, the weight widened:
as exact, in .65 to .8 of the time on an Intel chip with bf16 but not AMX. A chip's name says so, never a clock: results
must not depend on what else it does.

A copy is used while version counter, address and dtype of the weight and a sample of its entries are as they were, else
it is made anew. What goes past the counter, a write through `.data`, is seen only if it reaches the sample.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

ENV = "ALORA_PACK_ROWS"


def _rows_of(text: str) -> int:
    """What the environment says; 128 where it says nothing."""
    if text and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{ENV} must be a number of rows, 0 to pack no weight, got {text!r}")
    return int(text or 128)


FEW = _rows_of(os.environ.get(ENV, ""))
SMALLEST = 1 << 16  # entries of a weight: below, the calls take longer than the product
# longest sum of one float32 product of oneDNN's: the error grows with it, to 2.2 times MKL's at 576 and 3.2 at 2048
DEPTH = 1024
WIDE = 128  # rows above which widening pays: .8 to .95 of bf16's time at 128, .7 to .87 at 192
BLOCK = 512  # rows widened at a time
ROWS = 128  # that MKL is told of: it lays weights out alike for any number of rows but a single one
SAMPLE = 8  # entries far apart, each a miss of the cache: 64 took a fifth of a small product
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
DTYPES = (
    (torch.float32, torch.bfloat16) if AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
)


class Pack(NamedTuple):
    """A weight as a library wants it, cut along the sum, and what tells that it is still the same."""

    state: tuple[object, ...]
    sample: Tensor
    parts: tuple[tuple[slice, Tensor], ...]  # which columns of x, and their part of the weight
    nbytes: int
    by_mkl: bool  # in one part


@cache
def _intel() -> str:
    """What Linux says of an Intel chip; of others nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text if "GenuineIntel" in text else ""


def mkl_packs() -> bool:
    """Whether MKL packs float32: on Intel's chips, where it was measured."""
    return bool(_intel()) and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


@cache
def widens() -> bool:
    """Whether bf16 is the slower dtype: on Intel's chips without AMX, 3.8 times without bf16 and 1.65 times with it."""
    return bool(_intel()) and "amx_bf16" not in _intel()


_forward: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_backward: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias, `[M, K] [N, K]`; packed where w is a frozen parameter and M small, else `F.linear`'s or widened."""
    if not _packs(x, w):
        return _widened(x, w, bias) if _widens(x, w) else F.linear(x, w, bias)
    return _product(x, _forward, w, w, bias)


def matmul(dy: Tensor, w: Tensor) -> Tensor:
    """dy w, `[M, N] [N, K]`, likewise, from a copy of its own."""
    if not _packs(dy, w):
        return _widened(dy, w.t(), None) if _widens(dy, w) else dy @ w
    return _product(dy, _backward, w, w.t(), None)


def forget(w: Tensor) -> None:
    """Drop the copies of a weight that is about to be written to behind its version counter."""
    for kept in (_forward, _backward):
        kept.pop(w, None)


def nbytes() -> int:
    """Bytes of all copies."""
    return sum(pack.nbytes for kept in (_forward, _backward) for pack in list(kept.values()))


def _packs(x: Tensor, w: Tensor) -> bool:
    """Whether this product is one for packed weights: by kinds and sizes alone, so that equal calls give equal bits."""
    if not 0 < x.shape[0] <= FEW or type(w) is not nn.Parameter or w.requires_grad or not AVAILABLE:
        return False
    known = w.device.type == "cpu" and w.dtype in DTYPES and w.dtype == x.dtype and w.numel() >= SMALLEST
    return known and w.is_contiguous() and not w.is_inference()


def _widens(x: Tensor, w: Tensor) -> bool:
    """Likewise, whether it is one for float32; other types of weights multiply themselves."""
    if x.shape[0] <= WIDE or not x.dtype == w.dtype == torch.bfloat16 or w.device.type != "cpu":
        return False
    return type(w) in (Tensor, nn.Parameter) and widens()


def _widened(x: Tensor, laid: Tensor, bias: Tensor | None) -> Tensor:
    """x laid^T + bias by products of float32, rounded once."""
    y, wide = x.new_empty(x.shape[0], laid.shape[0]), laid.float()
    bias = None if bias is None else bias.float()
    for rows, part in zip(y.split(BLOCK), x.split(BLOCK), strict=True):
        rows.copy_(F.linear(part.float(), wide, bias))
    return y


def _pack(kept: WeakTensorKeyDictionary, w: Tensor, laid: Tensor) -> Pack:
    """The copy of w as it is now; laid is w or its transpose, `[outputs, inputs]`."""
    state = (w._version, w.data_ptr(), w.dtype, w.shape)
    sample = torch.as_strided(w, (SAMPLE,), (w.numel() // SAMPLE,))
    pack: Pack | None = kept.get(w)
    if pack is None or pack.state != state or not torch.equal(sample, pack.sample):
        with torch.no_grad():
            pack = kept[w] = _packed(laid.detach(), state, sample.clone())
    return pack


def _packed(laid: Tensor, state: tuple[object, ...], sample: Tensor) -> Pack:
    if laid.dtype == torch.float32 and mkl_packs():
        whole = torch.ops.mkl._mkl_reorder_linear_weight(laid.contiguous(), ROWS)
        return Pack(state, sample, ((slice(None), whole),), laid.nbytes, True)
    parts = _parts(laid)
    return Pack(state, sample, parts, sum(torch.ops.mkldnn._nbytes(part) for _, part in parts), False)


def _parts(laid: Tensor) -> tuple[tuple[slice, Tensor], ...]:
    depth = laid.shape[1]
    count = -(-depth // DEPTH) if laid.dtype == torch.float32 else 1
    step = -(-depth // count // 16) * 16
    columns = [slice(start, min(start + step, depth)) for start in range(0, depth, step)]
    return tuple((part, torch.ops.mkldnn._reorder_linear_weight(laid[:, part].contiguous(), None)) for part in columns)


def _product(x: Tensor, kept: WeakTensorKeyDictionary, w: Tensor, laid: Tensor, bias: Tensor | None) -> Tensor:
    """x laid^T + bias by the copy of w."""
    pack = _pack(kept, w, laid)
    (columns, first), *rest = pack.parts
    bias = None if bias is None else bias.contiguous()  # neither library looks at its stride
    if pack.by_mkl:
        return torch.ops.mkl._mkl_linear.default(x, first, laid, bias, x.shape[0])
    if not rest:
        return torch.ops.mkldnn._linear_pointwise.default(x, first, bias, "none", [], "")
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x[:, columns], first, bias, "none", [], "")
    for columns, part in rest:
        y = torch.ops.mkldnn._linear_pointwise.binary(x[:, columns], y, part, None, "add")
    return y
