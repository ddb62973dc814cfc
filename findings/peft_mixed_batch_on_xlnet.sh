#!/usr/bin/env bash
# PEFT: one adapter per row (`adapter_names=[...]` in the forward) on XLNet, 8 rows of 8 tokens.
# Guess: each row gets its adapter, as on BERT; a layer that cannot tell the rows apart refuses.
# Seen: XLNet puts time first, PEFT picks rows along the first dimension: adapters go to positions, not to rows. With as
# many tokens as rows nothing is raised and the logits are wrong; BERT, the control, is exact.
# Guard: where rows are is found by running the model on a tiny batch
# (tests/tuner/test_rows.py::test_time_first_however_the_batch_is_handed_over).
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

ids = torch.randint(4, 60, (8, 8), generator=torch.Generator().manual_seed(0))
names = ["one", "two"] * 4


def error(base, targets):
    def config():
        return LoraConfig(r=4, target_modules=targets, init_lora_weights=False)

    model = get_peft_model(base, config(), adapter_name="one")
    model.add_adapter("two", config())
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        alone = []
        for row, name in zip(ids, names):
            model.set_adapter(name)
            alone.append(model(input_ids=row[None]).logits[0])
    return float((mixed - torch.stack(alone)).abs().max() / torch.stack(alone).abs().max())


torch.manual_seed(0)
sizes = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
xlnet = error(transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**sizes)), ["layer_1", "layer_2"])
sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
bert = error(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)), ["query", "value"])
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
print(f"error of the mixed batch relative to the rows alone: XLNet {xlnet:.1e}, BERT {bert:.1e}")
raise SystemExit(not (xlnet > 1e-2 and bert < 1e-5))
PYTHON
