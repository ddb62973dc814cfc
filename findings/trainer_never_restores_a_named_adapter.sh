#!/usr/bin/env bash
# transformers' Trainer with load_best_model_at_end=True and a PEFT adapter that is not called "default".
# Guess: after train() the model holds the best checkpoint, whatever the adapter's name.
# Seen: the last step stays; a warning about a missing checkpoint is all. The file lies in a subfolder of the adapter's
# name, where Trainer does not look. The same run with an adapter called "default" restores the best step.
# Guard: it is restored under any name
# (tests/training/test_trainer_resume.py::test_the_best_model_is_restored_whatever_its_adapter_is_called).
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

transformers.logging.set_verbosity_error()
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


class Worse(transformers.Trainer):
    """Evaluations get worse with every step, so the first checkpoint is the best."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.log(metrics)
        return metrics


def last_step_stays(adapter):
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 3
    model = get_peft_model(llama(), LoraConfig(r=4), adapter_name=adapter)
    arguments = transformers.TrainingArguments(
        "run-" + adapter, per_device_train_batch_size=1, num_train_epochs=1, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.1, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )
    weights = {}

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights[state.global_step] = {k: v.detach().clone() for k, v in model.named_parameters() if "lora_" in k}

    trainer = Worse(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[Keep()])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1"), trainer.state.best_model_checkpoint
    now = {k: v for k, v in model.named_parameters() if "lora_" in k}
    return [step for step, kept in weights.items() if all(torch.equal(now[k], v) for k, v in kept.items())]


seen = {adapter: last_step_stays(adapter) for adapter in ("default", "mine")}
print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
print("the best step is 1; the model holds the weights of step:", seen)
raise SystemExit(seen != {"default": [1], "mine": [3]})
PYTHON
