#!/usr/bin/env bash
# PEFT: LoRA with task_type="SEQ_CLS" on DistilBERT. Which modules are trained in full beside the low-rank matrices?
# Guess: the new head, `classifier`, since PEFT sets modules_to_save to ["classifier", "score"].
# Seen: `pre_classifier` too: names are compared by their ends. Of DistilBERT-base that is 590,592 of 739,586 trained
# parameters, four times those of LoRA itself; and target_modules="all-linear" ends in a TypeError for the same reason.
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import peft
import transformers
from peft import LoraConfig, get_peft_model

base = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig())
model = get_peft_model(base, LoraConfig(r=8, task_type="SEQ_CLS", target_modules=["q_lin", "v_lin"]))
trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
full = {n.split(".")[2]: 0 for n in trained if "modules_to_save" in n}
for name, numel in trained.items():
    if name.split(".")[2] in full:
        full[name.split(".")[2]] += numel
print(f"peft {peft.__version__}, transformers {transformers.__version__}")
print("trained in full:", full, "of", sum(trained.values()), "trained parameters")
raise SystemExit(set(full) != {"pre_classifier", "classifier"})
PYTHON
