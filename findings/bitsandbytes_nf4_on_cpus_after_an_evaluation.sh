#!/usr/bin/env bash
# bitsandbytes, a frozen nf4 layer on a CPU with AVX512-BF16: the gradient of its input, before and after an evaluation.
# Guess: the weight is frozen, so an evaluation in between changes nothing.
# Seen: the first forward without gradients in evaluation mode packs the weight for a kernel that has no backward, for good.
# From then on, in training mode too, the input gets no gradient (None): LoRA below such a layer stops learning after its
# first evaluation. torch's UserWarning about a missing autograd kernel is the only sign. On other CPUs nothing is packed:
# the script then says so and ends with 0.
# Guard: such layers are unpacked before a gradient or a merge
# (tests/tuner/test_bases.py::test_four_bit_gradients_after_an_evaluation).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 bitsandbytes==0.50.2
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import bitsandbytes
import torch

torch.manual_seed(0)
layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
layer.load_state_dict(torch.nn.Linear(64, 64, bias=False).state_dict())
layer.to("cpu").requires_grad_(False)  # quantises


def gradient():
    x = torch.ones(2, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    return None if x.grad is None else round(float(x.grad.norm()), 3)


before = gradient()
with torch.no_grad():
    layer.eval()(torch.ones(2, 64))
after = gradient()
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
print(f"norm of the input's gradient: {before} before the evaluation, {after} after")
if "avx512_bf16" not in open("/proc/cpuinfo").read():
    print("this CPU has no AVX512-BF16: nothing is packed here")
    raise SystemExit(before != after)
raise SystemExit(not (before and after is None))
PYTHON
