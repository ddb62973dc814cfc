#!/usr/bin/env bash
# TRL's DPOTrainer with a PEFT model that has two adapters: "default", and "other", which is active and trained.
# Guess: without a ref_model the reference is the policy at its start, so all rewards of the first step are zero and its
# loss is log 2; or a model with several adapters is refused.
# Seen: the reference is a copy of "default", whatever is active: "other" is pulled towards an adapter that it has nothing
# to do with, without a word, from a first loss that is not log 2. An adapter of another name alone is a KeyError.
# Guard: refused with the remedy (tests/integrations/test_trl.py::test_a_reference_of_another_adapter_is_refused).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$work/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import math

import datasets
import tokenizers
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model

letters = {token: i for i, token in enumerate(["<pad>", "</s>", *"abcdef"])}
splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<pad>"))
splitter.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="</s>")
rows = datasets.Dataset.from_list([{"prompt": "ab", "chosen": "cd", "rejected": "ef"}] * 4)


def first_step(active):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))
    model.add_adapter("other", LoraConfig(r=4, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    model.set_adapter(active)
    options = {"max_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
    arguments = trl.DPOConfig(output_dir="run", per_device_train_batch_size=4, **options)
    trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return {key: trainer.state.log_history[0][key] for key in ("loss", "rewards/chosen", "rewards/rejected")}


print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}; log 2 is {math.log(2):.4f}")
found = {active: first_step(active) for active in ("default", "other")}
for active, numbers in found.items():
    print(f"active and trained: {active}; the first step:", numbers)
zero = [abs(numbers["loss"] - math.log(2)) < 1e-5 for numbers in found.values()]
raise SystemExit(zero != [True, False])
PYTHON
