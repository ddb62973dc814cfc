"""The training loss is the model's own, whatever it adds to the cross entropy, such as a balancing loss of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from alora_kernels import route
from alora_kernels.tuner import ALoRAConfig
from tests.support.trainers import CONFIG, TASKS, assert_close, logs_of, texts, trainer_on


class PenalisedLlama(LlamaForCausalLM):
    """A model that adds a term of its own to the loss."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1 * outputs.logits.float().logsumexp(-1).pow(2).mean()
        return outputs


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5)
MAKE = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**CONFIG, num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
                      router_aux_loss_coef=0.5)
    ),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**CONFIG, num_key_value_heads=2, head_dim=16, moe_intermediate_size=16, **EXPERTS)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**CONFIG, num_key_value_heads=2, **EXPERTS)),
    "a term of its own": lambda: PenalisedLlama(LlamaConfig(**CONFIG)),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(vocab_size=32, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=2, num_experts=4,
                                 decoder_start_token_id=0, dropout_rate=0.0, router_jitter_noise=0.0,
                                 output_router_logits=True)
    ),
}  # fmt: skip
PLAIN = 3.6  # about ln(32): what the cross entropy of a random model is


@pytest.mark.parametrize("kind", MAKE)
def test_the_loss_and_its_gradients_are_the_models_own(tmp_path, kind):
    torch.manual_seed(0)
    targets = ["q", "v"] if kind == "switch" else ["q_proj", "v_proj"]
    model = get_peft_model(MAKE[kind](), ALoRAConfig(r=2, tasks=TASKS, target_modules=targets, init_weights=False))
    data = texts(6)
    trainer = trainer_on(tmp_path, data, model, max_steps=1, eval_dataset=data)
    batch = trainer.data_collator(list(data))
    model.train()
    got = gradients(model, trainer.compute_loss(model, dict(batch)))
    inputs = {k: v for k, v in batch.items() if k != "task_ids"}
    with route(batch["task_ids"]):
        want = gradients(model, model(**inputs).loss)
    torch.testing.assert_close(got[0], want[0])
    if kind != "switch":  # where its own terms are small
        assert want[0] > PLAIN + 0.4
    assert_close(got[1], want[1], rtol=1.3e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(want[0]), rel=1e-4)
    trainer.train()
    assert logs_of(trainer)[-1]["loss"] == pytest.approx(float(want[0]), rel=1e-4)


def gradients(model: nn.Module, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
