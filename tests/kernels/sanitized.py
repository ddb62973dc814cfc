"""What sanitizers watch: a small launch of every kernel that waits, or with `racing` a flag raised without a release.

A program of its own: `compute-sanitizer` and `python -m triton.tools.gsan` start it.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from tests.kernels.test_races import Layer


@triton.jit
def _racing_kernel(flag_ptr, h_ptr, y_ptr):
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(h_ptr, 1.0)
        tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem="relaxed")  # says nothing about h
    else:
        turn = 0
        while (tl.atomic_add(flag_ptr, 0, sem="acquire") == 0) & (turn < 1 << 20):
            turn += 1
        tl.store(y_ptr + pid, tl.load(h_ptr))


def main() -> None:
    if "racing" in sys.argv:
        flag = torch.zeros(1, dtype=torch.int32, device="cuda")
        _racing_kernel[(64,)](flag, torch.zeros(1, device="cuda"), torch.zeros(64, device="cuda"))
    else:
        layer = Layer(300, 128, 256, 16, 3)
        layer.one_task(), layer.one_soft(), layer.two_task(), layer.two_soft(), Layer(8, 256, 128, 16, 4).decode()
        layer.pair_task(), layer.pair_soft()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
