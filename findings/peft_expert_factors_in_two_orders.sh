#!/usr/bin/env bash
# PEFT: the file of a LoRA on experts (target_parameters), 4 experts of rank 2: lora_A is [8, in] and lora_B [out, 8].
# Guess: ranks and experts are flattened in one order in both, so that expert e is rows 2e and 2e + 1 of A and columns 2e and
# 2e + 1 of B; their product is the expert's change, and [out, 8] [8, in] the sum of all.
# Seen: A lies expert by expert, B rank by rank: expert e is rows 2e and 2e + 1 of A, but columns e and e + 4 of B. Read in one
# order every expert but none of the shapes is wrong: the change is off by more than its own size. The last parameter that
# was adapted is called `experts.lora_A`, the first `experts.base_layer.lora_A`: the file's names do not say which is which.
# Guard: export writes both orders, and PEFT's logits are compared with ours
# (tests/models/test_models.py::test_a_model_is_right).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import peft
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

torch.manual_seed(0)
X, R = 4, 2
base = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, num_experts=X,
))
before = base.model.layers[0].mlp.experts.down_proj.detach().clone()
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
model = get_peft_model(base, LoraConfig(r=R, lora_alpha=R, target_modules=[], target_parameters=targets))
for name, p in model.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(p)
model.save_pretrained("saved")
file = {k.split("experts.")[1]: v for k, v in load_file("saved/adapter_model.safetensors").items()}
change = model.merge_and_unload().model.layers[0].mlp.experts.down_proj.detach() - before
a, b = file["lora_A.weight"], file["lora_B.weight"]  # of down_proj, the last one
one_order = torch.stack([b[:, R * e : R * e + R] @ a[R * e : R * e + R] for e in range(X)])
two_orders = torch.stack([b[:, e::X] @ a[R * e : R * e + R] for e in range(X)])
off = [float((read - change).norm() / change.norm()) for read in (one_order, two_orders)]
print(f"peft {peft.__version__}, transformers {tf.__version__}, torch {torch.__version__}")
print("tensors of the file:", {name: list(t.shape) for name, t in sorted(file.items())})
print(f"the experts' change, read in one order: off by {off[0]:.2f} of its size; A by expert and B by rank: {off[1]:.1e}")
raise SystemExit(not (off[0] > 0.5 and off[1] < 1e-5 and file["base_layer.lora_B.weight"].shape[0] == 48))
PYTHON
