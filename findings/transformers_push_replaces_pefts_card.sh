#!/usr/bin/env bash
# PEFT's push_to_hub of a LoRA, the upload replaced by a stub.
# Guess: the README.md that arrives is the one that save_pretrained writes into a folder: which base, library_name, tags.
# Seen: save_pretrained runs, and then transformers writes over its card the one it found on the Hub, or its own template
# if there was none; PEFT's card never leaves the machine, so the first push of an adapter does not name its base.
# Guard: the card goes along (tests/tuner/test_cards.py::test_a_push_takes_the_card_along_and_no_path).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
from pathlib import Path

import peft
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import hub

TEMPLATE = "---\ntags: [transformers]\n---\n# Model card\n"
arrived = {}


class Stub:
    """What a push asks of huggingface_hub."""

    def create_repo(self, repo_id, **options):
        return type("Repository", (), {"repo_id": repo_id})

    def create_commit(self, repo_id, operations, **options):
        arrived.update({each.path_in_repo: Path(each.path_or_fileobj).read_text() for each in operations
                        if each.path_in_repo.endswith((".md", ".json"))})


hub.hf_api = Stub
hub.create_and_tag_model_card = lambda *args, **options: ModelCard(TEMPLATE)  # a repository without a card
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
model.save_pretrained("saved")
saved = Path("saved/README.md").read_text()
model.push_to_hub("someone/adapter")
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print("library_name: peft, in the saved card:", "library_name: peft" in saved)
print("library_name: peft, in the pushed card:", "library_name: peft" in arrived["README.md"])
print("files that arrived:", ", ".join(sorted(arrived)))
raise SystemExit(not ("library_name: peft" in saved and "library_name: peft" not in arrived["README.md"]))
PYTHON
