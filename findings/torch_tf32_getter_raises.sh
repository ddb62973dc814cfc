#!/usr/bin/env bash
# torch: a program allows TF32 by the newer setting, as transformers' TrainingArguments(tf32=True) does, and a library asks
# whether it is allowed, by the getters that have been there for years.
# Guess: reading a setting never raises; the old getters answer for what the new setting says.
# Seen: `torch.get_float32_matmul_precision()` and `torch.backends.cuda.matmul.allow_tf32` raise a RuntimeError from then on,
# on machines without a GPU too; `torch.backends.cudnn.allow_tf32` answers.
# Guard: the newer setting alone is read
# (tests/kernels/test_precision.py::test_a_float32_layer_trains_after_the_trainer_allowed_tf32).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$work" && "$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch

getters = {
    "get_float32_matmul_precision()": torch.get_float32_matmul_precision,
    "backends.cuda.matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "backends.cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "backends.cuda.matmul.fp32_precision": lambda: torch.backends.cuda.matmul.fp32_precision,
}


def ask(get):
    try:
        return get()
    except RuntimeError as error:
        return f"RuntimeError: {str(error)[:60]} ..."


before = {name: ask(get) for name, get in getters.items()}
torch.backends.fp32_precision = "tf32"
after = {name: ask(get) for name, get in getters.items()}
print(f"torch {torch.__version__}, after torch.backends.fp32_precision = 'tf32':")
for name in getters:
    print(f"torch.{name}: {before[name]} before, {after[name]} after")
raises = [str(answer).startswith("RuntimeError") for answer in after.values()]
raise SystemExit(any(str(answer).startswith("RuntimeError") for answer in before.values()) or raises != [True, True, False, False])
PYTHON
