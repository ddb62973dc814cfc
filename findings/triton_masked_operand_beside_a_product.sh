#!/usr/bin/env bash
# Triton on Hopper, compiled ahead of time: a pipelined loop multiplies a tile that is masked in registers (dropout), alone
# or beside a product of the unmasked tile in the same turn.
# Guess: triton issue 9433 (a wgmma still reads registers that the next turn of the loop writes) was mended in 3.7, so from
# then on every such loop waits for all products before its next turn.
# Seen: with 3.9.0 the loop with one product waits for it; the loop with two ends its turn with a wait that leaves a group
# in flight, and the next turn writes the registers of the masked operand before anything waits again. 3.6.0 does that
# in both loops. One stage (num_stages=1) is safe in each. Nothing is run: the PTX is read, not what ptxas makes of it.
# Guard: such loops have one stage on Hopper, and a rule over the PTX holds every kernel to it
# (tests/kernels/test_launch.py::test_a_masked_operand_in_registers_is_not_overwritten).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/loops.py" <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def loops(x_ptr, keep_ptr, a_ptr, c_ptr, y_ptr, z_ptr, K, TWO: tl.constexpr, STAGES: tl.constexpr):
    rows, cols = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    y = tl.zeros((64, 64), dtype=tl.float32)
    z = tl.zeros((64, 64), dtype=tl.float32)
    for k in tl.range(0, K, 64, num_stages=STAGES):
        x = tl.load(x_ptr + rows * K + k + cols)
        keep = tl.load(keep_ptr + rows * K + k + cols)
        if TWO:
            z = tl.dot(x, tl.load(c_ptr + (k + rows) * 64 + cols), z)
        y = tl.dot(tl.where(keep != 0, x, 0.0), tl.load(a_ptr + (k + rows) * 64 + cols), y)
    tl.store(y_ptr + rows * 64 + cols, y)
    tl.store(z_ptr + rows * 64 + cols, z)


def in_flight(two, stages):
    """Whether a register of a product that nothing has waited for is written in the loop's next turn."""
    pointers = {"x_ptr": "*bf16", "keep_ptr": "*i8", "a_ptr": "*bf16", "c_ptr": "*bf16", "y_ptr": "*fp32", "z_ptr": "*fp32"}
    constants = {"TWO": two, "STAGES": stages}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(7)}
    source = ASTSource(loops, pointers | {"K": "i32"} | dict.fromkeys(constants, "constexpr"), constants, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    lines = [re.sub(r"^@!?%p\d+\s+", "", line.strip()) for line in ptx.splitlines()]
    products = [i for i, line in enumerate(lines) if line.startswith("wgmma.mma_async")]
    for end, line in enumerate(lines):
        target = line.split()[-1].rstrip(";") + ":" if line.startswith("bra") else ""
        starts = [i for i in range(end) if target and lines[i].startswith(target)]
        if not starts or not any(starts[0] < i < end for i in products):
            continue
        flying, group = [], set()
        for step in 2 * lines[starts[0] : end]:
            if step.startswith("wgmma.mma_async"):
                operand = step.split("}", 1)[1].split("}")[0]
                group |= set(re.findall(r"%\w+", operand)) if "{" in operand else set()
            elif step.startswith("wgmma.commit_group"):
                flying, group = [*flying, group], set()
            elif step.startswith("wgmma.wait_group"):
                kept = int(re.search(r"(\d+);", step)[1])
                flying = flying[-kept:] if kept else []
            elif step.startswith("{") or " " in step and not re.match(r"(st|bar|bra|fence|cp|mbarrier|wgmma|\.|//)", step):
                written = set(re.findall(r"%\w+", step.split("}")[0] if "{" in step else step.split(",")[0]))
                if written & set().union(group, *flying):
                    return True
    return False


found = {f"{n} product{'s' * (n > 1)}, {s} stage{'s' * (s > 1)}": in_flight(n > 1, s) for n in (1, 2) for s in (1, 3)}
print(f"triton {triton.__version__}: a register in use is written: {found}")
sys.exit(list(found.values()) != eval(sys.argv[1]))
PYTHON
changed=0
for version in "3.6.0 [False,True,False,True]" "3.9.0 [False,False,False,True]"; do
    python3 -m venv "$work/${version% *}"
    "$work/${version% *}/bin/python" -m pip install --quiet "triton==${version% *}" numpy==2.3.5 setuptools==80.9.0
    (cd "$work" && TRITON_CACHE_DIR="$work/cache" "$work/${version% *}/bin/python" loops.py "${version#* }") || changed=1
done
[ "$changed" = 0 ] && echo "as described" || echo "changed"
exit "$changed"
