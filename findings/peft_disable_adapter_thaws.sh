#!/usr/bin/env bash
# PEFT: A is frozen (requires_grad_(False), as FFA-LoRA does), then the base is evaluated inside `model.disable_adapter()`.
# Guess: leaving the context gives everything back as it was; A stays frozen.
# Seen: every parameter of the active adapter requires a gradient afterwards, A too: 0 of 4 before, 4 of 4 after, and the
# next optimizer over `requires_grad` parameters trains them.
# Guard: `requires_grad` comes back as it was
# (tests/tuner/test_adapters.py::test_disabled_adapters_come_back_as_they_were).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


model = get_peft_model(llama(), LoraConfig(r=4))
a = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
for parameter in a:
    parameter.requires_grad_(False)
before = sum(parameter.requires_grad for parameter in a)
with model.disable_adapter(), torch.no_grad():
    model(torch.arange(6)[None])
after = sum(parameter.requires_grad for parameter in a)
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print(f"trainable lora_A: {before} of {len(a)} before disable_adapter(), {after} after")
raise SystemExit((before, after) != (0, len(a)))
PYTHON
