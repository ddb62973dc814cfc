#!/usr/bin/env bash
# transformers' Trainer with load_best_model_at_end=True, evaluated every 5 steps and saved every 10 (the arguments ask
# for a multiple, and take it), where the best evaluation falls between two checkpoints.
# Guess: after train() the model holds the best of the steps that were both evaluated and saved.
# Seen: nothing is restored and nothing is said: the last step stays, though a saved step was better; best_metric is that
# of a model which is nowhere. Where an earlier best was saved that one comes back, beside the metric of another step.
# Guard: a best step that may not be saved is warned of
# (tests/training/test_checkpoints.py::test_a_best_step_that_may_not_be_saved_is_warned_of).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W error::UserWarning - <<'PYTHON'
import torch
import transformers


class Model(torch.nn.Module):
    """One number, which the callback below sets to the number of the step."""

    def __init__(self):
        super().__init__()
        self.step = torch.nn.Parameter(torch.zeros(1))

    def forward(self, labels=None):
        return {"loss": (self.step * 0).sum(), "logits": labels}


class Count(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.step.data.fill_(float(state.global_step))


class Scored(transformers.Trainer):
    losses = {}

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": self.losses[self.state.global_step]}
        self.log(metrics)
        return metrics


def trained(name, losses):
    arguments = transformers.TrainingArguments(
        name, max_steps=20, per_device_train_batch_size=1, eval_strategy="steps", eval_steps=5, save_strategy="steps",
        save_steps=10, load_best_model_at_end=True, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.0,
    )
    rows = [{"labels": torch.zeros(1)}] * 20
    trainer = Scored(Model(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[Count()])
    trainer.losses = losses
    trainer.train()
    return int(trainer.model.step), trainer.state.best_global_step, trainer.state.best_metric


print(f"transformers {transformers.__version__}, torch {torch.__version__}; checkpoints at 10 and 20")
seen = {
    "losses at 5, 10, 15, 20: .1 .2 .3 .4": trained("first", {5: 0.1, 10: 0.2, 15: 0.3, 20: 0.4}),
    "losses at 5, 10, 15, 20: .4 .2 .1 .3": trained("second", {5: 0.4, 10: 0.2, 15: 0.1, 20: 0.3}),
}
for losses, (step, best, metric) in seen.items():
    print(f"{losses}: the model is that of step {step}; best_global_step {best}, best_metric {metric}")
raise SystemExit([*seen.values()] != [(20, 5, 0.1), (10, 15, 0.1)])
PYTHON
