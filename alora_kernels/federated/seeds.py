"""Numbers from names: every draw has its own seed, so no result depends on the order in which things were built.

In:   the run's seed and words such as a client's name, a key, a round.
Out:  an integer seed, or an array of initial values.
Who:  `adapters` for initial values, `client` for the seed of a round.

The same values come out on every machine and under every engine, which is what lets frozen parts stay at home.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray


def seed_of(seed: int, *words: object) -> int:
    """A 63-bit seed from the run's seed and any words."""
    digest = hashlib.sha256("\x1f".join([str(seed), *map(str, words)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def kaiming(shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Uniform in +-1/sqrt(fan_in), as LoRA draws A (Kaiming with a = sqrt 5), fan_in the last dimension."""
    bound = 1 / math.sqrt(shape[-1]) if shape[-1] else 0.0
    return np.random.default_rng(seed).uniform(-bound, bound, shape)
