"""Which dtype a frozen base gets on a device, and why: by what the device can do and a probe, never by a guess.

`data.load_model`, recipes, `alora serve` and `alora doctor` ask here. That a chip has bfloat16 does not say that it
multiplies it faster than float32: docs/precision.md. Adapters are float32 in either case.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dtypes import AUTO, DTYPE_NAMES, not_a_dtype
from .files import cache_dir, replacing
from .text import counted

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
CLEARLY = 1.3  # times faster: what is less does not pay for eight bits of mantissa
SHAPE = (128, 576, 1536)  # rows, in, out: a layer of SmolLM2-135M; 1.5 ms in float32 on two cores
ROUNDS, ATTEMPTS = 7, 3
FILE = "precision.json"
FACTS = ("vendor_id", "model name", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
# of this thread alone: beside busy neighbours wall time is off by a factor of ten (Windows counts it in 16 ms)
_clock = time.perf_counter if os.name == "nt" else time.thread_time


class Choice(NamedTuple):
    """A dtype and why it was chosen, in words for a user."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """As recipes and options spell it."""
        return str(self.dtype).removeprefix("torch.")


def resolve(wish: str | torch.dtype = AUTO, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype that `explain` gives."""
    return explain(device, wish).dtype


def explain(
    device: torch.device | str | None = None, wish: str | torch.dtype = AUTO, whose: str = "asked for"
) -> Choice:
    """The dtype of a frozen base on a device, and the reason.

    Args:
        device: where the base will compute; None is a GPU if there is one, else the CPU.
        wish: "float32", "bfloat16", "float16" or any floating dtype is what comes back. "auto" is bfloat16 on a GPU
            that multiplies it natively, and on a CPU where a product of realistic size is measured to be 1.3 times
            faster in it; else float32. The measurement takes some 20 ms and is kept in the user's cache folder, by
            chip, torch and number of threads. It changes no setting and draws no random number.

        whose: the reason where the wish is a dtype.

    Raises:
        ValueError: a wish that is none of these.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    if wish == AUTO:
        return _automatic(place)
    dtype = DTYPES.get(wish) if isinstance(wish, str) else wish
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise not_a_dtype(wish, (AUTO, *DTYPES), others=", or a floating torch.dtype")
    if place.type == "cpu" and dtype == torch.float16:
        _warn_of_half()
    lacks = _cpu_lacks() if place.type == "cpu" and dtype == torch.bfloat16 else None
    return Choice(dtype, f"{whose}, though {lacks}" if lacks else whose)


@cache
def _warn_of_half() -> None:
    """Once per process."""
    with suppress(AttributeError, RuntimeError):  # an older torch, or one without oneDNN
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return
    warnings.warn(
        "float16 on this CPU, which does not multiply it: on a chip with AVX-512 its products took 3.6 times as long as"
        " float32's (torch 2.13). Choose bfloat16 where `alora doctor` does, else float32; float16 is for GPUs",
        stacklevel=4,
    )


def _automatic(place: torch.device) -> Choice:
    if place.type == "cpu":
        lacks = _cpu_lacks()
        return Choice(torch.float32, lacks) if lacks else _by_probe(torch.get_num_threads())
    if place.type != "cuda":
        return Choice(torch.float32, f"nothing is known of {place.type} here: ask for bfloat16 if it has it")
    with torch.cuda.device(place):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if native:
        return Choice(torch.bfloat16, "this GPU multiplies it natively")
    return Choice(torch.float32, "this GPU has no bfloat16")


def _cpu_lacks() -> str | None:
    """Why bfloat16 cannot be fast on this CPU, without a measurement; None if it may be."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN, which multiplies bfloat16 on CPUs"
    if not torch.backends.mkldnn.enabled:
        return "oneDNN, which multiplies bfloat16 on CPUs, is switched off (torch.backends.mkldnn)"
    with suppress(AttributeError, RuntimeError):
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
    return "this CPU has no bfloat16"


def _by_probe(threads: int) -> Choice:
    wide, half = _seconds(_key(threads))
    shape = " x ".join(map(str, SHAPE))
    measured = f"{shape} takes {1e3 * wide:.2f} ms in float32 and {1e3 * half:.2f} in bfloat16"
    dtype = torch.bfloat16 if wide >= CLEARLY * half else torch.float32
    return Choice(dtype, f"measured: {measured}, {wide / half:.1f} times as fast; {counted(threads, 'thread')}")


@cache
def _seconds(key: str) -> tuple[float, float]:
    """Time of the product in float32 and in bfloat16: from this machine's file, else measured and kept there."""
    known = _kept()
    if key in known:
        return known[key]
    for _ in range(ATTEMPTS):
        best, middle = _measure()
        if (best[0] >= CLEARLY * best[1]) == (middle[0] >= CLEARLY * middle[1]):
            _keep(known | {key: best})
            return best
    return middle  # neighbours were too busy for a result that lasts: the next process measures again


@torch.inference_mode()
def _measure() -> tuple[tuple[float, float], tuple[float, float]]:
    """The product's fastest and middle times in float32 and bfloat16, measured in turn."""
    m, k, n = SHAPE
    x, w = (torch.linspace(-1, 1, rows * k, dtype=torch.float32, device="cpu").view(rows, k) for rows in (m, n))
    pairs = [(x.to(dtype), w.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    times: tuple[list[float], list[float]] = ([], [])
    with torch.autocast("cpu", enabled=False):
        for turn in range(ROUNDS + 1):  # the first warms up
            for (rows, weight), found in zip(pairs, times, strict=True):
                start = _clock()
                F.linear(rows, weight)
                if turn:
                    found.append(max(_clock() - start, 1e-9))
    return (min(times[0]), min(times[1])), (statistics.median(times[0]), statistics.median(times[1]))


def _key(threads: int) -> str:
    """What the times depend on: the chip, torch, threads, and the settings that choose other kernels."""
    chip = f"{platform.machine()} {platform.processor()}"
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        chip += "".join(line for line in first.splitlines() if line.split("\t")[0].split(":")[0].strip() in FACTS)
    set_ = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(("ONEDNN_", "DNNL_", "MKL_", "ATEN_")))
    told = [f"{chip}\n{set_}", torch.__version__, str(threads), torch.get_float32_matmul_precision()]
    return ", ".join([hashlib.sha256(told[0].encode()).hexdigest()[:16], *told[1:]])


def _kept() -> dict[str, tuple[float, float]]:
    """What earlier processes measured; a file that does not read is one that is not there."""
    with suppress(OSError, RuntimeError, ValueError, AttributeError, TypeError):  # no home folder is a RuntimeError
        values = json.loads((cache_dir() / FILE).read_text(encoding="utf-8")).items()
        return {key: (float(wide), float(half)) for key, (wide, half) in values if 0 < wide < 1 and 0 < half < 1}
    return {}


def _keep(known: dict[str, tuple[float, float]]) -> None:
    with suppress(OSError, RuntimeError):  # a folder that cannot be written costs 20 ms a process
        path = cache_dir() / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
