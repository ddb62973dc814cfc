#!/usr/bin/env bash
# PEFT: `load_adapter(folder, "default")` on a model that already has an adapter "default" with another lora_alpha.
# Guess: the adapter answers as it does after PeftModel.from_pretrained: its config comes with it, or the clash is refused.
# Seen: the tensors are taken, lora_alpha and with it the scaling stay those of the old adapter: 1 instead of 8. No word.
# Guard: another scaling, order or set of tasks is refused before a number is written
# (tests/tuner/test_storage.py::test_other_settings_are_refused_before_a_write).
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
from peft import LoraConfig, PeftModel, get_peft_model

def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


ids = torch.arange(6)[None]
saved = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=32, init_lora_weights=False)).eval()
saved.save_pretrained("adapter")
fresh = PeftModel.from_pretrained(llama(), "adapter").eval()
again = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=4)).eval()
again.load_adapter("adapter", "default")
again.set_adapter("default")

with torch.no_grad():
    right, from_pretrained, load_adapter = (model(ids).logits for model in (saved, fresh, again))
scalings = [model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] for model in (saved, fresh, again)]
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print("scaling: saved, from_pretrained, load_adapter over an existing name:", scalings)
print("largest error of the logits: from_pretrained", float((from_pretrained - right).abs().max()))
print("                             load_adapter   ", float((load_adapter - right).abs().max()))
raise SystemExit(scalings != [8, 8, 1] or bool(torch.allclose(load_adapter, right, atol=1e-3)))
PYTHON
