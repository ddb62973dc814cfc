"""A build for tests ends its waits; one for users has no trace of that."""

from __future__ import annotations

import json

from .process import compiling

SCRIPT = """
import importlib, json, os
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from alora_kernels.kernels import sync

def ptx():
    source = ASTSource(sync.wait_for, {"counters_ptr": "*i32", "flag": "i32", "count": "i32"})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

plain = ptx()
os.environ["ALORA_WAIT_TURNS"] = "12345"
importlib.reload(sync)
print(json.dumps([plain, ptx()]))
"""


def test_only_a_test_build_gives_up() -> None:
    plain, bounded = json.loads(compiling("-c", SCRIPT))
    assert ".acquire" in plain and ".max" not in plain
    assert ".acquire" in bounded and ".max" in bounded
