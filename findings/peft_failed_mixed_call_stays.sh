#!/usr/bin/env bash
# PEFT: two LoRA on one model; a mixed call (`adapter_names=[...]`) fails inside the model, here for a token id that the
# embedding does not know, and the program catches the error and goes on with the active adapter.
# Guess: what the call set up is taken down with it; the next call answers as it did before.
# Seen: the hooks of the failed call stay. A batch of as many rows is answered by the adapters of the failed call, without a
# word; a batch of another size is refused for the number of adapter names, though it gave none.
# Guard: routing ends with the call, however it ends
# (tests/tuner/test_routing.py::test_an_exception_in_the_forward_ends_the_routing).
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

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False), adapter_name="one")
model.add_adapter("two", LoraConfig(r=4, init_lora_weights=False))
model.eval()
ids = torch.arange(12).reshape(2, 6)

with torch.no_grad():
    one = model(ids).logits
    two = model(ids, adapter_names=["two", "two"]).logits
    try:
        model(ids + 60, adapter_names=["two", "two"])
    except IndexError as error:
        print("the mixed call failed:", error)
    after = model(ids).logits
    try:
        refused = not model(torch.arange(18).reshape(3, 6))
    except ValueError as error:
        refused = str(error)
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print("active adapter:", model.active_adapter)
print("the next call answers as before:", bool(torch.equal(after, one)), "- as the adapter of the failed call:", bool(torch.equal(after, two)))
print("a batch of three rows without adapter_names:", refused)
raise SystemExit(not torch.equal(after, two) or torch.equal(after, one) or "3 respectively" not in str(refused))
PYTHON
