"""Counts that change with the batch are in no key, but for five kernels: another number of rows compiles no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .process import compiling

SCRIPT = str(Path(__file__).with_name("keys.py"))
LONG = (4096, 4097, 4104, 5000, 8191, 9999)
SHORT = (33, 40, 48, 63, 64)  # blocks of as many rows


@pytest.mark.parametrize("routing", ["task", "soft"])
@pytest.mark.parametrize("rows", [LONG, SHORT], ids=["long", "short"])
def test_another_number_of_rows_is_no_other_kernel(routing: str, rows: tuple[int, ...]) -> None:
    def found(*sizes: int) -> dict[str, int]:
        keys: dict[str, int] = json.loads(compiling(SCRIPT, routing, *map(str, sizes)))
        # these know whether 16 divides the rows: without that they spill 8 to 40 bytes on a chip or other
        knowing = ("expand_backward", "da", "shrink_soft", "gate_backward", "one_pass_soft")
        return {kernel: number for kernel, number in keys.items() if kernel not in knowing}

    assert found(*rows) == found(rows[0])
