#!/usr/bin/env bash
# TRL's SFTTrainer: the loss of an evaluation set of short texts, which are packed into rows for it.
# Guess: texts of a row never see each other, so the loss is that of the same texts unpacked, whichever of `packing` and
# `eval_packing` asked for it, and whether the set is given to the trainer or to evaluate().
# Seen: with packing=True and a set given to the trainer it is so. With eval_packing=True alone, training being padded, and
# with packing=True for a set given to evaluate() by name, every text sees those before it in its row and the loss is
# another, without a word: what keeps texts apart is decided by `packing` alone, and a named set is packed a second time,
# which forgets where its texts end.
# Guard: a packed row is proven on the first batch to keep its texts apart
# (tests/integrations/test_trl.py::test_a_model_whose_packed_texts_see_each_other_is_refused).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import tempfile

import datasets
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 64)}
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), pad_token="<pad>", eos_token="<eos>"
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, initializer_range=0.5, **SIZES))
texts = Dataset.from_list([{"input_ids": torch.randint(3, 64, (length,)).tolist()} for length in (7, 9, 5, 8, 6)])


def loss(named=False, **options):
    settings = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 40, "disable_tqdm": True}
    arguments = trl.SFTConfig(tempfile.mkdtemp(), per_device_eval_batch_size=5, **settings, **options)
    given = {"train_dataset": texts, "eval_dataset": texts, "processing_class": tokenizer}
    trainer = trl.SFTTrainer(model, arguments, **given)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.evaluate({"some": texts})["eval_some_loss"] if named else trainer.evaluate()["eval_loss"]


right = {"unpacked": loss(), "unpacked, by name": loss(named=True), "packing=True": loss(packing=True)}
wrong = {"packing=True, by name": loss(named=True, packing=True), "eval_packing=True": loss(eval_packing=True)}
print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
for what, value in {**right, **wrong}.items():
    print(f"{what}: loss {value:.4f}")
truth = right["unpacked"]
apart = [abs(value - truth) for value in wrong.values()]
raise SystemExit(not (max(abs(value - truth) for value in right.values()) < 1e-4 < 1e-2 < min(apart)))
PYTHON
