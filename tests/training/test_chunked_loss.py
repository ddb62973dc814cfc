"""The loss at labelled positions alone is the loss of all logits, in value, in every gradient, and in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alora_kernels.training import chunked_loss
from alora_kernels.training.loss import ModelLoss
from alora_kernels.training.rules import BatchRules

VOCABULARY = 97
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(
    num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, output_router_logits=True,
    router_aux_loss_coef=0.5,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "llama, tied": ("LlamaForCausalLM", SIZES | dict(tie_word_embeddings=True)),
    "gemma2, capped": ("Gemma2ForCausalLM", SIZES | dict(head_dim=8, final_logit_softcapping=3.0)),
    "gemma3, capped": ("Gemma3ForCausalLM", SIZES | dict(head_dim=8, final_logit_softcapping=3.0)),
    "granite, divided": ("GraniteForCausalLM", SIZES | dict(logits_scaling=8.0)),
    "cohere, multiplied": ("CohereForCausalLM", SIZES | dict(logit_scale=0.0625)),
    "qwen2-moe, balanced": ("Qwen2MoeForCausalLM", SIZES | EXPERTS),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "phi, bias": ("PhiForCausalLM", SIZES),
    "bert, bias, no shift": ("BertForMaskedLM", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    name, settings = MODELS[kind]
    torch.manual_seed(0)
    kind_of = getattr(tf, name)
    model = kind_of(kind_of.config_class(**settings | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def batch_of(rows: int = 4, length: int = 9) -> dict[str, Tensor]:
    """Rows with all labels, some and none."""
    ids = torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :6] = labels[2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def learned(model: nn.Module, batch: dict[str, Tensor], wrapped: Any = None) -> ModelLoss:
    loss = ModelLoss(BatchRules.of(model))
    loss.learn(lambda few: model(**few), batch, model=model if wrapped is None else wrapped)
    return loss


def scored(loss: ModelLoss, model: nn.Module, batch: dict, smoothing: float, all_logits: bool) -> tuple:
    model.zero_grad()
    found = loss(model, batch, smoothing, all_logits=all_logits)
    found.mean.backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(loss: ModelLoss, model: nn.Module, batch: dict, smoothing: float = 0.0, rtol: float = 2e-5) -> None:
    """Values and gradients of both ways; a gradient is compared at its largest entry."""
    want, plain = scored(loss, model, batch, smoothing, all_logits=True)
    got, ours = scored(loss, model, batch, smoothing, all_logits=False)
    assert got.outputs["logits"].shape[-1] == 0
    torch.testing.assert_close(got.mean, want.mean)
    torch.testing.assert_close(got.losses, want.losses.detach())
    assert torch.equal(got.right, want.right)
    assert torch.equal(got.counts, want.counts)
    assert plain.keys() == ours.keys()
    for name, gradient in plain.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-2)
        assert error <= rtol, (name, float(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_all_logits(kind, dtype, monkeypatch):
    if dtype == torch.float64 and "moe" in kind:
        pytest.skip("its experts do not multiply in float64")
    monkeypatch.setattr(chunked_loss, "CHUNK", 5)
    model, batch = model_of(kind, dtype), batch_of()
    loss = learned(model, batch)
    assert loss.whole_because == ""
    for smoothing in (0.0, 0.1):
        assert_same(loss, model, batch, smoothing)


def test_a_batch_without_labels_gives_zero_and_gradients_of_zero():
    model, batch = model_of("llama"), batch_of()
    loss = learned(model, batch)
    batch["labels"][:] = -100
    found, gradients = scored(loss, model, batch, 0.0, all_logits=False)
    assert float(found.mean.detach()) == 0.0
    assert found.right.all()
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients.values())


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_logits_of_all_positions_never_exist(monkeypatch):
    size = 1009
    monkeypatch.setattr(chunked_loss, "CHUNK", 5)
    model, batch = model_of("llama", vocab_size=size), batch_of(4, 60)
    loss = learned(model, batch)
    sizes = {}
    for all_logits in (True, False):
        with Largest() as largest:
            loss(model, batch, 0.1, all_logits=all_logits).mean.backward()
        sizes[all_logits] = largest.entries
    assert sizes[True] == 4 * 60 * size
    assert sizes[False] <= 32 * size  # the weight; its gradient is summed over chunks of as many positions


def test_only_a_few_tokens_are_tried():
    size = 1009
    model, batch = model_of("llama", vocab_size=size, max_position_embeddings=512), batch_of(4, 480)
    with Largest() as largest:
        loss = learned(model, batch)
    assert loss.head is not None
    assert largest.entries <= 2 * 32 * size
