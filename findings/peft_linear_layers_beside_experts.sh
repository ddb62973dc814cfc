#!/usr/bin/env bash
# PEFT: target_modules=["gate_proj", "up_proj", "down_proj"] on DeepSeek-V3, whose dense first layer and shared experts are
# nn.Linear of these names, while its routed experts are 3-D parameters in transformers 5.
# Guess: the linear layers of these names are adapted (and perhaps the routed experts); "all-linear" adapts every nn.Linear.
# Seen: none of the six is adapted: the names are rewritten to the experts' parameters and taken off the list, and only
# those are adapted. "all-linear" leaves the same six out, and adapts the router `mlp.gate` instead. No word of it.
# Guard: "all-linear" adapts every linear layer and names experts that are parameters
# (tests/tuner/test_rows.py::test_experts_and_routers_that_are_parameters_are_named).
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

NAMES = ["gate_proj", "up_proj", "down_proj"]
config = transformers.DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
)
seen = {}
for targets in (NAMES, "all-linear"):
    base = transformers.DeepseekV3ForCausalLM(config)
    linear = [n for n, m in base.named_modules() if type(m) is torch.nn.Linear and n.split(".")[-1] in NAMES]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    adapted = [n for n in linear if n in model.targeted_module_names]
    seen[str(targets)] = (len(linear), len(adapted), sorted(model.targeted_parameter_names))
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
for targets, (all_of_them, adapted, parameters) in seen.items():
    print(f"{targets}: {adapted} of {all_of_them} nn.Linear called gate_proj, up_proj or down_proj; parameters {parameters}")
raise SystemExit([row[:2] for row in seen.values()] != [(6, 0), (6, 0)])
PYTHON
