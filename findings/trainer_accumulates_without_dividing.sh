#!/usr/bin/env bash
# transformers' Trainer with gradient_accumulation_steps=4 and T5 or BART; Llama beside them as the control.
# Guess: four batches of 2 rows give the loss and the gradient of one batch of 8, as all rows have as many labels.
# Seen: for T5 and BART both are 4 times as large, without a word; for Llama they are the same. Trainer takes a forward
# with **kwargs for one that divides its loss by num_items_in_batch, and then does not divide by the 4 steps itself;
# T5 and BART have such a forward, pass the kwargs on to their layers, and return the mean of each batch.
# Guard: a step cut into batches of any size has one gradient
# (tests/training/test_batch_loss.py::test_the_gradient_is_that_of_the_rows_alone).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import accelerate
import torch
import transformers
from transformers import default_data_collator

transformers.logging.set_verbosity_error()
IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 3, "dropout": 0.0,
}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "T5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**IDS, **T5)),
    "BART": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**IDS, **BART)),
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**IDS, **LLAMA)),
}
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(4, 44).reshape(8, 5)]


def logged(build, batch, steps):
    """Loss and gradient norm of one step over the 8 rows."""
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        "run", per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1, logging_steps=1,
        optim="sgd", max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )
    trainer = transformers.Trainer(build(), arguments, train_dataset=ROWS, data_collator=default_data_collator)
    trainer.train()
    return [trainer.state.log_history[0][name] for name in ("loss", "grad_norm")]


print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, torch {torch.__version__}")
seen = {}
for name, build in MODELS.items():
    whole, parts = logged(build, 8, 1), logged(build, 2, 4)
    seen[name] = [round(part / right, 2) for part, right in zip(parts, whole)]
    print(f"{name}: loss and gradient norm of 8 rows {whole}, of 4 times 2 rows {parts}")
print("too large by:", seen)
raise SystemExit(seen != {"T5": [4.0, 4.0], "BART": [4.0, 4.0], "Llama": [1.0, 1.0]})
PYTHON
