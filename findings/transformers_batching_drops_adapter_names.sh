#!/usr/bin/env bash
# transformers' continuous batching on a PEFT model: `model.generate_batch(prompts, adapter_names=["one", "two"])`.
# Guess: each prompt is answered by its adapter, as `generate` does with the same argument; or the argument is refused.
# Seen: it is taken and not used: every prompt is answered by the active adapter, without a word.
# Guard: `generate_batch(adapter_names=...)` is refused by name
# (tests/tuner/test_routing.py::test_generate_batch_says_that_it_cannot_route); `alora_kernels.serving` routes it per
# request.
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 psutil==7.1.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, pad_token_id=0, **sizes))
model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False), adapter_name="one")
model.add_adapter("two", LoraConfig(r=4, init_lora_weights=False))
with torch.no_grad():
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.normal_(std=0.3)
model.eval()
prompt, names = [5, 6, 7], ["one", "two"]
settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
rows = torch.tensor([prompt, prompt])
right = model.generate(rows, generation_config=settings, adapter_names=names)[:, len(prompt):].tolist()
answers = model.generate_batch([prompt, prompt], generation_config=settings, adapter_names=names, progress_bar=False)
batched = [answer.generated_tokens for answer in answers.values()]
print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}; active: {model.active_adapter}")
print("generate,       adapters one and two:", *right)
print("generate_batch, adapters one and two:", *batched)
raise SystemExit(right[0] == right[1] or batched != [right[0], right[0]])
PYTHON
