#!/usr/bin/env bash
# PEFT's LoRA on a model that transformers splits over two processes by its own tensor-parallel plan (gloo, CPU).
# Guess: layers split by columns and by rows both train, since PEFT handles the plan's DTensors when it makes and saves
# adapters, and a forward without gradients works for both.
# Seen: q_proj (columns) trains; o_proj (rows) answers without gradients and raises a RuntimeError in training, because
# lora_A counts this process's columns where the plan's output expects the whole width.
# Guard: both plans train, gradients equal one process's
# (tests/tuner/test_split_base.py::test_two_ranks_compute_as_one_process).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
cat >"$work/split.py" <<'PYTHON'
import sys

import peft
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
if sys.argv[1] == "make":
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **SIZES)).save_pretrained("base")
    raise SystemExit
seen = {}
for target in ("q_proj", "o_proj"):
    base = AutoModelForCausalLM.from_pretrained("base", distributed_config=DistributedConfig(tp_size=2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            try:
                model(input_ids=torch.arange(12).view(2, 6))
                seen[target, gradients] = "works"
            except RuntimeError as error:
                seen[target, gradients] = str(error)
if dist.get_rank() == 0:
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    for (target, gradients), what in seen.items():
        print(f"{target}, {'with' if gradients else 'without'} gradients: {what}", flush=True)
dist.destroy_process_group()
raise SystemExit([what == "works" for what in seen.values()] != [True, True, True, False])
PYTHON
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$work/venv/bin/python" split.py make
"$work/venv/bin/python" -m torch.distributed.run --nproc-per-node 2 split.py split
