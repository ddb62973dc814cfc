"""`ALoRATrainer`'s life: trained twice, resumed when finished, the best model restored."""

from __future__ import annotations

import pytest
import torch

from alora_kernels.training import ALoRATrainer

from .test_trainer import arguments, peft_model, rows, states


def test_a_second_call_of_train_goes_on_with_the_same_optimiser(tmp_path):
    """As stock Trainer: the optimiser and its moments stay; tasks that are absent stay put in the second run too."""
    trainer = ALoRATrainer(model=peft_model(), args=arguments(tmp_path, max_steps=3), train_dataset=rows(30))
    trainer.train()
    after_first = {k: v.clone() for k, v in states(trainer).items()}
    optimizer = trainer.optimizer
    trainer.train_dataset = rows(30).filter(lambda row: row["task"] != "zero")
    trainer.train()
    assert trainer.optimizer is optimizer
    moved = {
        task: any(not torch.equal(v[i], after_first[k][i]) for k, v in states(trainer).items() if "_A" in k)
        for i, task in enumerate(("copy", "next", "zero"))
    }
    assert moved == {"copy": True, "next": True, "zero": False}


@pytest.mark.parametrize("steps", [7, 10])  # inside an epoch of five steps, and at its end
def test_resuming_a_finished_run_makes_no_step(tmp_path, steps):
    def trainer() -> ALoRATrainer:
        args = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=steps)
        return ALoRATrainer(model=peft_model(), args=args, train_dataset=rows(30))

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    a, b = states(whole), states(again)
    assert all(torch.equal(a[name], b[name]) for name in a)
