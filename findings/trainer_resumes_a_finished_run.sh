#!/usr/bin/env bash
# transformers' Trainer: a run of max_steps=7, 5 steps an epoch, is over; the same script resumes it from checkpoint-7.
# Guess: train() sees that nothing is left to do, makes no step and returns the model of the checkpoint.
# Seen: it makes step 8 of 7: the weights move and a checkpoint-8 is written. Whether to stop is asked after a step only.
# A run that ended with its epoch (10 steps) is left as it is.
# Guard: a finished run makes no step
# (tests/training/test_trainer_resume.py::test_resuming_a_finished_run_makes_no_step).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import os

import accelerate
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(40).reshape(10, 4)]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def trained(steps, resume):
    """The steps that were made in the end, and the weights."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **SIZES))
    arguments = transformers.TrainingArguments(
        f"run-{steps}", per_device_train_batch_size=2, max_steps=steps, save_strategy="steps", save_steps=1,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=f"run-{steps}/checkpoint-{steps}" if resume else None)
    return trainer.state.global_step, torch.cat([p.detach().flatten() for p in model.parameters()])


seen = {}
for steps in (7, 10):
    (_, before), (made, after) = trained(steps, resume=False), trained(steps, resume=True)
    one_more = os.path.exists(f"run-{steps}/checkpoint-{steps + 1}")
    seen[steps] = {"steps": made, "weights moved": not torch.equal(before, after), "one more checkpoint": one_more}
print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, torch {torch.__version__}")
print("max_steps: after the finished run was resumed:", seen)
raise SystemExit(
    seen != {
        7: {"steps": 8, "weights moved": True, "one more checkpoint": True},
        10: {"steps": 10, "weights moved": False, "one more checkpoint": False},
    }
)
PYTHON
