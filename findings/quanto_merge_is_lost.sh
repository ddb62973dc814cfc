#!/usr/bin/env bash
# PEFT on a base quantised by optimum-quanto: merge_and_unload().
# Guess: the merged model answers as the adapter did, up to the rounding of int8; or the merge is refused.
# Seen: the merged model answers as the bare base did, exactly: the sum is written somewhere else, without a word.
# Guard: a merge is refused where the base would not compute with it
# (tests/tuner/test_bases.py::test_a_merge_that_would_be_lost_is_refused_by_name).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 optimum-quanto==0.2.7
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import optimum.quanto
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


ids = torch.arange(6)[None]
base = llama()
optimum.quanto.quantize(base, weights=optimum.quanto.qint8)
optimum.quanto.freeze(base)
with torch.no_grad():
    bare = base(ids).logits
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, init_lora_weights=False)).eval()
    adapted = model(ids).logits
    merged = model.merge_and_unload()(ids).logits
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print("the adapter changes the logits by", float((adapted - bare).abs().max()))
print("merged and adapted differ by     ", float((merged - adapted).abs().max()))
print("merged and the bare base by      ", float((merged - bare).abs().max()))
raise SystemExit(not (torch.equal(merged, bare) and not torch.allclose(adapted, bare, atol=1e-2)))
PYTHON
