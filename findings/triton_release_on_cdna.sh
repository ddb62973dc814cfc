#!/usr/bin/env bash
# Triton, compiled ahead of time for AMD's gfx942: a program writes a tile with all its waves, meets `tl.debug_barrier()`, and
# raises a flag by `tl.atomic_add(flag, 1, sem="release", scope="gpu")` for a program that waits for the tile.
# Guess: as on NVIDIA, the barrier and the release make the whole program's stores visible before the flag.
# Seen: no wave waits for its own stores before the barrier (no `s_waitcnt vmcnt(0)` between the last store and `s_barrier`);
# the one wave that raises the flag waits for its own alone. Stores of the other waves may still be on their way
# when the flag is seen. For sm_90 the release is `red.release` after `bar.sync`, which covers them. Nothing is run:
# the code is read.
# Guard: no kernel that raises flags is used on AMD's chips
# (tests/kernels/test_launch.py::test_kernels_that_raise_flags_are_not_for_amd).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet triton==3.9.0 numpy==2.4.6 setuptools==80.9.0
cat >"$work/flag.py" <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def publish(x_ptr, y_ptr, flag_ptr):
    i = tl.arange(0, 1024)
    tl.store(y_ptr + i, tl.load(x_ptr + i))
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1, sem="release", scope="gpu")


source = ASTSource(publish, {"x_ptr": "*fp32", "y_ptr": "*fp32", "flag_ptr": "*i32"}, {})
waves = {"num_warps": 4}
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=waves).asm["ptx"]
gcn = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=waves).asm["amdgcn"]
steps = [line.split(";")[0].strip() for line in gcn.splitlines()]
stored = max(i for i, line in enumerate(steps) if re.match(r"(buffer|global)_store", line))
barrier = next(i for i, line in enumerate(steps) if i > stored and line.startswith("s_barrier"))
raised = next(i for i, line in enumerate(steps) if line.startswith("global_atomic_add"))
between = [line for line in steps[stored + 1 : barrier] if line.startswith("s_waitcnt")]
after = [line for line in steps[barrier:raised] if line.startswith("s_waitcnt")]
print(f"triton {triton.__version__}, gfx942: waits between the last store and the barrier: {between}, between barrier and flag: {after}")
nvidia = [line.strip() for line in ptx.splitlines() if "bar.sync" in line or "release" in line]
print("sm_90:", "; ".join(nvidia))
sys.exit(any("vmcnt(0)" in line for line in between) or not any("vmcnt(0)" in line for line in after) or "release" not in nvidia[-1])
PYTHON
cd "$work" && TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" -W ignore flag.py
