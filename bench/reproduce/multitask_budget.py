"""`multitask-budget`: the methods of `multitask`, each with about as many parameters as ALoRA. (ALoRA, its tables)

At equal rank one LoRA has a third of ALoRA's parameters for five tasks, and a LoRA per task two thirds more: there a
better average may be a matter of size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from . import multitask
from .multitask import cases, figure, run, table
from .numbers import Claim, Number

__all__ = ["cases", "claims", "figure", "run", "table"]


def claims(rows: Sequence[Number]) -> list[Claim]:
    return [dataclasses.replace(claim, text=f"{claim.text}; equal parameters") for claim in multitask.claims(rows)]
