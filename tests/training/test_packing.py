"""Batches without padding: the same losses and gradients as padded ones, and padding, by name, where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from alora_kernels import keep_routing
from alora_kernels.ops.attention import Segments
from alora_kernels.training import packing
from alora_kernels.tuner import ALoRAConfig
from tests.support.trainers import TASKS, assert_equal, peft_model, states, texts, trainer_on

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 32}
GQA = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
SOME = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 32, "n_positions": 64}
MOE = GQA | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
PACKED = {
    "Llama": (GQA, {}),
    "GPT2": (SOME, {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "GPTNeoX": (SIZES | {"max_position_embeddings": 64}, {}),
    "Qwen2Moe": (MOE, {"output_router_logits": True}),
    "OPT": (SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}, {"dropout": 0.0}),
}
PADDED = {
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 32}, "can be told positions"),
    "Mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 32}, "can be told positions"),
    "Mistral": (GQA | {"sliding_window": 4}, "sliding_window=4"),
    # windows that only the mask is told of, longer than the rows of the proof
    "Qwen2Moe": (
        MOE | {"sliding_window": 20, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
        "asks for a mask",
    ),
    "Phimoe": (GQA | {"sliding_window": 20, "num_local_experts": 2}, "asks for a mask"),
    "Gemma2": (GQA | {"head_dim": 8, "layer_types": ["full_attention"] * 2}, "softcap"),
}


def adapted(family: str, sizes: dict[str, Any], dtype: torch.dtype = torch.float64, **adapter: Any) -> nn.Module:
    cls = getattr(transformers, f"{family}ForCausalLM", None) or getattr(transformers, f"{family}LMHeadModel")
    torch.manual_seed(0)
    model = cls(getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # grouped products know no float64
    settings = dict(r=4, tasks=TASKS, init_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, ALoRAConfig(**(settings | adapter))).to(dtype)


def batch(trainer: Any) -> dict[str, Any]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def step(trainer: Any) -> dict[str, torch.Tensor]:
    """Loss, what is logged of tasks, and the gradient of every trained tensor on the first batch."""
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, batch(trainer), num_items_in_batch=torch.tensor(50))
    loss.backward()
    logged = {name: torch.tensor(value) for name, value in trainer._trained.logs().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **logged, **grads}


def shapes_seen(trainer: Any) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    embedding = trainer.model.get_base_model().get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


@pytest.mark.parametrize("family", PACKED)
def test_losses_and_gradients_are_those_of_padded_batches(tmp_path: Path, family: str):
    sizes, options = PACKED[family]
    results = []
    for padding_free in (False, None):
        trainer = trainer_on(tmp_path, texts(24), adapted(family, sizes | options), padding_free=padding_free)
        seen = shapes_seen(trainer)
        results.append(step(trainer))
    assert trainer.packing.padded_because == ""
    tokens = int(batch(trainer)["attention_mask"].sum())
    assert seen[-1] == (1, tokens)
    assert trainer.model.config._attn_implementation == "sdpa"  # as it was
    padded, packed = results
    assert padded.keys() == packed.keys()
    assert sum("lora" in name for name in padded) > 4
    for name in padded:
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("family", PADDED)
def test_models_that_cannot_stay_padded_and_say_why(tmp_path: Path, family: str):
    sizes, why = PADDED[family]
    model = adapted(family, sizes, torch.float32, target_modules=r".*\.0\..*(q_proj|in_proj)|.*0.*dense")
    trainer = trainer_on(tmp_path, texts(24), model)
    seen = shapes_seen(trainer)
    step(trainer)
    assert why in trainer.packing.padded_because
    assert seen[-1][0] == 6


def test_noise_that_depends_on_the_length_of_rows_stays_as_it_is(tmp_path: Path):
    moved = []
    for padding_free in (False, None):
        model = adapted("Llama", GQA, torch.float32)
        trainer = trainer_on(tmp_path, texts(24), model, padding_free=padding_free, neftune_noise_alpha=5.0)
        trainer.train()
        moved.append(states(trainer))
    assert "NEFTune" in trainer.packing.padded_because
    assert_equal(*moved)


def test_who_asked_for_it_is_warned(tmp_path: Path):
    trainer = trainer_on(tmp_path, texts(24), adapted("Mistral", GQA | {"sliding_window": 4}), padding_free=True)
    with pytest.warns(UserWarning, match="stay padded although padding_free=True: .*sliding_window=4"):
        step(trainer)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda model: setattr(model.get_base_model().config, "_attn_implementation", "flex_attention"),
            "flex_attention",
        ),
    ],
)
def test_states_in_which_a_model_stays_padded(tmp_path: Path, change: Any, why: str):
    trainer = trainer_on(tmp_path, texts(24), adapted("Llama", GQA))
    step(trainer)
    change(trainer.model)
    packed = trainer.packing
    reason = packing._cannot(trainer.model, trainer.model.get_base_model(), batch(trainer), trainer._losses[True])
    assert packed.padded_because == "" and why in reason


@pytest.mark.parametrize("again", ["by transformers", "by a layer of its own"])
def test_activations_computed_again_are_those_of_the_packed_rows(tmp_path: Path, again: str):
    results, calls = [], []
    for padding_free, checkpoints in ((False, False), (True, True)):
        model = adapted("Llama", GQA)
        queries = model.get_base_model().model.layers[-1].self_attn.q_proj
        queries.register_forward_pre_hook(lambda *_: calls.append("again"))
        if checkpoints and again == "by transformers":
            model.gradient_checkpointing_enable()
        elif checkpoints:
            checkpoint_attention(model, keep_routing)
        trainer = trainer_on(tmp_path, texts(24), model, padding_free=padding_free)
        seen = shapes_seen(trainer)
        step(trainer)  # which proves, and so runs more often
        calls.clear()
        results.append(step(trainer))
    assert trainer.packing.padded_because == "" and seen[-1][0] == 1
    assert len(calls) == 2
    assert model.config._attn_implementation == "sdpa"
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-8, atol=1e-11, msg=name)


def checkpoint_attention(model: Any, keep: Any) -> None:
    """Let a layer's attention be computed again in the backward pass."""
    attention = model.get_base_model().model.layers[-1].self_attn
    inner = attention.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(keep(inner), *args, use_reentrant=False, **kwargs)

    attention.forward = recomputed


def test_a_layer_that_is_recomputed_on_its_own_is_found_out(tmp_path: Path):
    model = adapted("Llama", GQA, target_modules=["down_proj"])
    checkpoint_attention(model, lambda inner: inner)
    trainer = trainer_on(tmp_path, texts(24), model)
    step(trainer)
    assert "Checkpoint" in trainer.packing.padded_because


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_leak_between_rows_is_found(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Rows that see those before them, their own tokens included: only small changes of a random model's loss."""
    run = packing.segment_attention

    def leaks(q: Any, k: Any, v: Any, segments: Segments, **options: Any) -> Any:
        return run(q, k, v, Segments([0, segments.q_bounds[-1]]), **options)

    for broken in (False, True):
        if broken:
            monkeypatch.setattr(packing, "segment_attention", leaks)
        trainer = trainer_on(tmp_path, texts(24), adapted("Llama", GQA, dtype))
        step(trainer)
        assert bool(trainer.packing.padded_because) == broken, trainer.packing.padded_because


def test_dropout_may_be_on(tmp_path: Path):
    sizes = SOME | {"attn_pdrop": 0.2, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    trainer = trainer_on(tmp_path, texts(24), adapted("GPT2", sizes, lora_dropout=0.1))
    first, second = step(trainer), step(trainer)
    assert trainer.packing.padded_because == ""
    assert first["loss"] != second["loss"]
    assert all(module.training for module in trainer.model.modules())


def test_training_moves_as_with_padding(tmp_path: Path):
    moved = []
    for padding_free in (False, True):
        trainer = trainer_on(
            tmp_path, texts(48), peft_model(), padding_free=padding_free, gradient_accumulation_steps=2
        )
        trainer.train()
        moved.append(states(trainer))
    assert trainer.packing.padded_because == ""
    for name, value in moved[0].items():
        torch.testing.assert_close(moved[1][name], value, rtol=2e-3, atol=2e-4, msg=name)


def test_rounding_under_the_trainers_autocast_is_no_difference(tmp_path: Path):
    trainer = trainer_on(tmp_path, texts(24), adapted("Llama", GQA, torch.float32), bf16=True, max_steps=1)
    trainer.train()
    assert trainer.packing.padded_because == ""


def test_a_batch_with_holes_or_labels_in_the_mask_stays_padded():
    ids = torch.arange(1, 13).view(2, 6)
    labels = ids.clone()
    labels[:, 0] = -100
    plain = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    no_label = labels.masked_fill(plain == 0, -100)
    no_label[0, 2] = -100
    packed = packing.pack({"input_ids": ids, "attention_mask": plain, "task_ids": torch.tensor([4, 7])}, no_label)
    assert packed.inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert packed.inputs["task_ids"].tolist() == [[4] * 4 + [7] * 5]
    assert packed.inputs["labels"].tolist() == [[-100, 4, 5, 6, -100, 8, 9, 10, 11]]
    assert packed.segments.q_bounds == [0, 4, 9] and packed.counts.tolist() == [3, 4]
    assert packing.pack({"input_ids": ids, "attention_mask": plain}, labels) is None
    assert packing.pack({"input_ids": ids, "attention_mask": 0 * plain}, torch.full_like(labels, -100)) is None
    holes = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    assert packing.pack({"input_ids": ids, "attention_mask": holes}, labels.masked_fill(holes == 0, -100)) is None


@pytest.mark.parametrize("ids", ["row", "token"])
def test_rows_of_several_texts_stay_padded(tmp_path: Path, ids: str):
    """transformers reads texts from positions that start again where there is no mask; the batch before had none."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 30, (4, 12), generator=generator)
    labels = tokens.index_fill(1, torch.tensor([0, 7]), -100)
    task_ids = torch.arange(4) % 3 if ids == "row" else torch.arange(48).view(4, 12) % 3
    one = {"input_ids": tokens, "labels": labels, "position_ids": torch.arange(12).expand(4, 12), "task_ids": task_ids}
    several = one | {"position_ids": torch.cat([torch.arange(7), torch.arange(5)]).expand(4, 12)}
    losses = []
    for padding_free in (False, None):
        trainer = trainer_on(tmp_path, texts(24), adapted("Llama", GQA), padding_free=padding_free)
        seen = shapes_seen(trainer)
        model = trainer.model.train()
        losses.append([trainer.compute_loss(model, dict(each)).item() for each in (one, several)])
    assert trainer.packing.padded_because == "" and (1, 48) in seen
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)


def test_adapters_that_begin_at_tokens_of_a_row_stay_padded(tmp_path: Path):
    """None of the first batch's rows has them, so that nothing of the adapter shows in the proof."""
    config = LoraConfig(r=2, init_lora_weights=False, alora_invocation_tokens=[30, 31], task_type="CAUSAL_LM")
    model = get_peft_model(adapted("Llama", GQA).unload(), config).double()
    trainer = trainer_on(tmp_path, texts(24), model)
    step(trainer)
    assert "activated LoRA" in trainer.packing.padded_because


def test_another_model_is_tried_anew(tmp_path: Path):
    """As `hyperparameter_search` puts one in the place of another; GPT-J asks for no attention of ours."""
    trainer = trainer_on(tmp_path, texts(24), adapted("Llama", GQA))
    step(trainer)
    assert trainer.packing.padded_because == ""
    trainer.model = adapted("GPTJ", SOME | {"rotary_dim": 4}, target_modules=["q_proj"])
    step(trainer)
    assert "losses of packed rows are" in trainer.packing.padded_because


def test_one_row_alone_waits_for_another_batch(tmp_path: Path):
    data = Dataset.from_list([texts(24)[0]])
    trainer = trainer_on(tmp_path, data, adapted("Llama", GQA))
    step(trainer)
    assert trainer.packing.padded_because is None
