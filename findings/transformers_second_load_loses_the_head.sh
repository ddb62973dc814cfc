#!/usr/bin/env bash
# transformers' own `load_adapter` (no PeftModel): a classifier whose LoRA was saved with its trained head, loaded under a
# second name, or again after `delete_adapter`.
# Guess: a load makes the adapter active with all that its folder holds, as the first load does.
# Seen: the matrices of the second load are active, its head is not: the classifier answers through the base's untrained head,
# without a word, until `set_adapter(name)` is called with the name that is active already.
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()


config = LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False, target_modules=["query", "value"])
saved = get_peft_model(bert(), config).eval()
with torch.no_grad():
    saved.base_model.model.classifier.modules_to_save["default"].weight.normal_()
saved.save_pretrained("adapter")
ids = torch.arange(6)[None]


def error(model):
    with torch.no_grad():
        return round(float((model.eval()(ids).logits - saved(ids).logits).abs().max()), 3)


found = {}
model = bert()
model.load_adapter("adapter", adapter_name="a")
found["first load"] = error(model)
model.load_adapter("adapter", adapter_name="b")
found["second load, the same folder"] = error(model)
active = model.active_adapters()
model.set_adapter("b")
found["after set_adapter of the name that was active"] = error(model)
again = bert()
again.load_adapter("adapter", adapter_name="a")
again.delete_adapter("a")
again.load_adapter("adapter", adapter_name="a")
found["loaded, deleted, loaded"] = error(again)
print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}; active after the second load: {active}")
for what, number in found.items():
    print(f"largest error of the logits, {what}: {number}")
raise SystemExit([number == 0 for number in found.values()] != [True, False, True, False] or active != ["b"])
PYTHON
