#!/usr/bin/env bash
# Triton, compiled ahead of time: `x / 3.0` and `x / d` with d = 3.0 given at run time, float32, for sm_90 and gfx942.
# Guess: both are divisions, rounded alike on both makers' chips and as in the interpreter (which divides in NumPy).
# Seen: on NVIDIA the constant one is a multiplication by an approximate reciprocal (div.approx once, mul per element), the
# other is div.full (2 units of the last place by the PTX manual); on AMD both are the full sequence. An element that is quantised or compared after a division by a
# constant may differ between chips, and from the interpreter. `tl.div_rn` divides on both.
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet triton==3.9.0 numpy==2.4.6 setuptools==80.9.0
cat >"$work/divide.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def divide(x_ptr, y_ptr, d, HOW: tl.constexpr):
    i = tl.arange(0, 128)
    x = tl.load(x_ptr + i)
    if HOW == "constant":
        y = x / 3.0
    elif HOW == "argument":
        y = x / d
    else:
        y = tl.div_rn(x, tl.full((128,), 3.0, tl.float32))
    tl.store(y_ptr + i, y)


found = {}
for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for how in ("constant", "argument", "div_rn"):
        signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "d": "fp32", "HOW": "constexpr"}
        built = triton.compile(ASTSource(divide, signature, {"HOW": how}), target=target)
        code = built.asm.get("ptx") or built.asm["amdgcn"]
        used = sorted(set(re.findall(r"\b(?:div|mul)\.(?:\w+\.)?f32|v_div_fixup_f32", code)))
        found[target.backend, how] = used
        print(f"triton {triton.__version__}, {target.backend}, {how}: {', '.join(used)}")
nvidia = [found["cuda", how] for how in ("constant", "argument", "div_rn")]
same = nvidia[:2] == [["div.approx.f32", "mul.f32"], ["div.full.f32"]] and nvidia[2] == ["div.rn.f32"]
raise SystemExit(not same or any(found["hip", how] != ["v_div_fixup_f32"] for how in ("constant", "argument")))
PYTHON
cd "$work" && TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" -W ignore divide.py
