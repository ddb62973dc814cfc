"""Rows of a layer that are not its first dimension: time first, windows, tables, experts, images, uncalled weights.

Each case: a mixed batch equals every row alone, in its values and in its gradients, with as many tokens as rows too.
More models are judged like that, and when they generate and are merged, in tests/models.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from alora_kernels import route
from alora_kernels.adapters.method import Method
from alora_kernels.baselines.layers import PerTaskLinear
from alora_kernels.baselines.methods import adapt
from alora_kernels.tuner.probe import probe

from ..support.tiny import VOCAB, adapted, config, each_row_alone, layers_of, llama, llava

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODER_DECODER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
NAMES = ["math", "code", "__base__"]


def build(kind: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    family = settings.pop("config", kind.partition("For")[0].removesuffix("LMHeadModel"))
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, kind)(config).eval()


BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deberta": ("DebertaV2ForSequenceClassification", {
        **WIDTH, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "max_position_embeddings": 64,
    }),
    "fsmt": ("FSMTForConditionalGeneration", {
        **ENCODER_DECODER, "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "langs": ["en", "de"],
        "max_position_embeddings": 64, "decoder_start_token_id": 0,
    }),
    "jamba": ("JambaForCausalLM", {
        **WIDTH, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_key_value_heads": 2,
    }),
    "led": ("LEDForConditionalGeneration", {
        **ENCODER_DECODER, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64,
        "attention_window": 4,
    }),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mixtral": ("MixtralForCausalLM", {**WIDTH, "num_key_value_heads": 2, "num_local_experts": 4}),
    "nllb_moe": ("NllbMoeForConditionalGeneration", {
        **ENCODER_DECODER, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64,
    }),
    "opt": ("OPTForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
    }),
    "qwen_moe": ("Qwen2MoeForCausalLM", {
        **WIDTH, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_key_value_heads": 2,
    }),
    "swin": ("SwinForImageClassification", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    }),
    "xlnet": ("XLNetLMHeadModel", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
}  # fmt: skip


def base_of(name: str) -> Any:
    if name not in BASES:
        return {"llama": llama, "llava": llava}[name]()
    kind, settings = BASES[name]
    vocabulary = {} if name in ("swin", "fsmt") else {"vocab_size": VOCAB}
    return build(kind, **settings, **vocabulary)


def quietly(base: Any, **overrides: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapted(base, task_type=None, **overrides)


def inputs(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    given = {"input_ids": torch.randint(4, VOCAB - 1, (rows, length), generator=generator)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(4, VOCAB - 1, (rows, length), generator=generator)
    return given


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


ROWS = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(1))  # as many steps as rows
LENGTHS = [3, 1, 2]


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("base", ["xlnet", "fsmt", "qwen_moe", "opt"])
def test_a_mixed_batch_equals_its_rows_alone(base, length):
    model = quietly(base_of(base))
    given, names = inputs(model.base_model.model, 3, length), NAMES
    mixed = model(**given, adapter_names=names).logits
    (mixed**2).sum().backward()
    together, alone = gradients(model), {}
    for row, name in enumerate(names):
        one = model(**{k: v[row : row + 1] for k, v in given.items()}, adapter_names=[name]).logits
        torch.testing.assert_close(mixed[row : row + 1], one, rtol=1e-4, atol=1e-5)
        (one**2).sum().backward()
        for key, grad in gradients(model).items():
            alone[key] = alone.get(key, 0) + grad
    assert together.keys() == alone.keys()
    for key, grad in together.items():
        torch.testing.assert_close(grad, alone[key], rtol=1e-3, atol=1e-4, msg=key)
    same = model(**given, adapter_names=["code"] * 3).logits
    assert not torch.allclose(mixed[0], same[0], atol=1e-3)  # the tasks do differ
    torch.testing.assert_close(mixed[1], same[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["led", "deberta"])
def test_one_lora_per_task_has_the_same_layers_and_rows(base):
    with pytest.warns(UserWarning, match="target modules alone"):
        model = adapt(base_of(base), Method("lora-per-task", tasks=("math", "code"), task_type=None))
    assert {n for n, m in model.named_modules() if isinstance(m, PerTaskLinear)} == {
        layer.rows_name for layer in layers_of(quietly(base_of(base)))
    }
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, PerTaskLinear):
            layer.lora_B.data.normal_(generator=generator)
    given = inputs(model, 3, 3)
    with torch.no_grad(), route([0, 1, -1]):
        mixed = model(**given).logits
    for row, task in enumerate([0, 1, -1]):
        with torch.no_grad(), route([task]):
            alone = model(**{k: v[row : row + 1] for k, v in given.items()}).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "left", "why"),
    [
        ("deberta", r"query_proj", "inputs of no row"),
        ("nllb_moe", r"experts\.expert_\*\.fc", "an order that the data decide"),
        ("llava", r"vision_tower", "images or sound have rows of their own"),
        ("jamba", r"mamba\.dt_proj", "their weights are used without calling them"),
        ("mamba", r"mixer\.dt_proj", "their weights are used without calling them"),
    ],
)
def test_what_cannot_be_served_is_left_alone_and_named_once(base, left, why, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapted(base_of(base), task_type=None)
    (told,) = [str(w.message) for w in caught if "target modules alone" in str(w.message)]
    assert re.search(f"{why}.*{left}", told)
    excluded = model.peft_config["default"].exclude_modules
    assert excluded and not excluded & {layer.rows_name for layer in layers_of(model)}
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(base_of(base), tmp_path)
    assert not [w for w in caught if "target modules alone" in str(w.message)]
    assert [layer.rows_name for layer in layers_of(again)] == [layer.rows_name for layer in layers_of(model)]


def test_a_learned_router_and_a_single_task_keep_modules_whose_rows_are_unknown():
    for settings in ({"routing": "soft"}, {"tasks": ["only"]}):
        names = {layer.rows_name for layer in layers_of(quietly(base_of("deberta"), **settings))}
        assert any(name.endswith("query_proj") for name in names)
        assert any("vision_tower" in layer.rows_name for layer in layers_of(quietly(llava(), **settings)))
    model = quietly(base_of("deberta"), tasks=["only"])
    given = inputs(model.base_model.model, 2, 5)
    assert model(**given, adapter_names=["only"] * 2).logits.shape == (2, 2)
    with pytest.raises(ValueError, match=r"query_proj: task_ids of shape \(2,\) fit neither"):
        model(**given, adapter_names=["only", "__base__"])


def test_nothing_left_is_refused_by_name():
    with pytest.raises(ValueError, match=r"cannot adapt these target_modules:\n.*inputs of no row.*query_proj"):
        adapted(base_of("deberta"), task_type=None, target_modules=["query_proj"])


@pytest.mark.parametrize(("base", "target"), [("mamba", "out_proj"), ("mamba", "dt_proj"), ("jamba", "dt_proj")])
@pytest.mark.parametrize("settings", [{}, {"tasks": ["only"]}, {"routing": "soft"}])
def test_weights_that_are_used_without_a_call_are_refused(base, target, settings):
    with pytest.raises(ValueError, match=f"without calling them.*{target}"):
        adapted(base_of(base), task_type=None, target_modules=["in_proj", target], **settings)


EXPERTS = r"mlp\.experts\."


@pytest.mark.parametrize(
    ("targets", "count", "names"),
    [
        ("all-linear", 6, rf"{EXPERTS}gate_up_proj.*{EXPERTS}down_proj.*mlp\.gate\.weight"),
        (["q_proj", "w1"], 2, f"{EXPERTS}gate_up_proj"),
        (["q_proj", "down_proj"], 2, f"{EXPERTS}down_proj"),
    ],
)
def test_experts_and_routers_that_are_parameters_are_named(targets, count, names):
    with pytest.warns(UserWarning, match=rf"{count} tensors of experts or their routers.* model\.layers\.\*\.{names}"):
        assert layers_of(adapted(base_of("mixtral"), target_modules=targets))


def test_other_targets_of_such_a_model_are_no_reason_for_a_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ALoRA")
        adapted(base_of("mixtral"), target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("base", ["llama", "led", "nllb_moe", "deberta", "swin", "mamba"])
def test_the_probe_leaves_nothing_behind(base):
    model = base_of(base).train()
    tensors = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    modules, settings, state = dict(model.named_modules()), model.config.to_dict(), torch.get_rng_state()
    assert probe(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and dict(model.named_modules()) == modules and model.config.to_dict() == settings
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, tensors[name]) and getattr(tensor, "grad", None) is None


def test_a_model_that_cannot_be_run_keeps_its_modules_and_refuses_what_does_not_fit():
    with torch.device("meta"):
        base = base_of("led")
    assert probe(base) is None
    assert {layer.rows for layer in layers_of(quietly(base))} == {None}


def test_a_model_that_is_not_from_transformers_is_not_run():
    model = Recurrent()
    assert probe(model) is None
    assert adapted(model, task_type=None, target_modules=["first"]) and model.calls == 0


def test_a_router_that_returns_several_tensors_is_left_alone():
    text = {**WIDTH, "vocab_size": VOCAB, "num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size_mlp": 48}
    base = build("Llama4ForCausalLM", config="Llama4Text", **text, head_dim=8)
    with pytest.warns(UserWarning, match=r"more than one tensor.*feed_forward\.router"):
        model = adapted(base, routing="soft")
    assert not any(layer.rows_name.endswith("router") for layer in layers_of(model))


def test_a_second_adapter_beside_the_first():
    model = quietly(base_of("led"), target_modules=["key", "fc1"])
    model.add_adapter("other", config(task_type=None, target_modules=["query", "fc1"], r=2))
    model.set_adapter("other")
    each_row_alone(model, inputs(model.base_model.model, 3, 3), NAMES, rtol=1e-4, atol=1e-5)
    rows = {layer.rows_name: layer.rows for layer in layers_of(model)}
    assert {"time", "batch"} == set(rows.values())


class Blocks(nn.Module):
    """torch's own encoder, as a model of its own, whose batch comes first from outside."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_of_torch(batch_first, training):
    """Time first by default; in evaluation torch has a fast path that reads the weights and would skip the adapters."""
    model = adapted(Blocks(batch_first), task_type=None, target_modules=["linear1", "linear2"]).train(training)
    mixed = each_row_alone(model, {"x": ROWS}, NAMES)
    assert not torch.allclose(mixed[0], Blocks(batch_first).train(training)(ROWS)[0], atol=1e-3)


class Recurrent(nn.Module):
    """Nobody's model: time first inside, as recurrent layers have it, a table that every batch shares, and a count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.inner, self.table, self.rnn = *(nn.Linear(8, 8) for _ in range(3)), nn.LSTM(8, 8)
        self.register_buffer("calls", torch.zeros(1))
        self.places = torch.randn(3, 8)

    def forward(self, batch: Any, lengths: Any = None, options: Any = None) -> torch.Tensor:
        self.calls += 1
        x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
        steps = torch.tanh(self.inner(torch.tanh(self.first(x)).transpose(0, 1))) + self.table(self.places)[:, None]
        if lengths is None:
            return self.rnn(steps)[0].transpose(0, 1)
        packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], total_length=len(steps))[0].transpose(0, 1)


CALLS = {
    "tensor": lambda rows: ((ROWS[rows],), {}),
    "dict": lambda rows: (({"x": ROWS[rows]},), {}),
    "named dict": lambda rows: ((), {"batch": {"x": ROWS[rows]}}),
    "tuple": lambda rows: (((ROWS[rows],),), {}),
    "lengths": lambda rows: ((ROWS[rows], [LENGTHS[i] for i in rows]), {}),
    "options": lambda rows: ((ROWS[rows],), {"options": {"kind": [1, "a"]}}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_time_first_however_the_batch_is_handed_over(call):
    model = adapted(Recurrent(), task_type=None, target_modules=["first", "inner"])
    args, kwargs = call([0, 1, 2])
    state = torch.get_rng_state()
    mixed = model(*args, **kwargs, adapter_names=NAMES)
    assert {layer.rows_name: layer.rows for layer in layers_of(model)} == {"first": "batch", "inner": "time"}
    assert model.base_model.model.calls == 1 and torch.equal(torch.get_rng_state(), state)
    for row, name in enumerate(NAMES):
        same = model(*args, **kwargs, adapter_names=[name] * 3)
        torch.testing.assert_close(mixed[row], same[row])  # one task for all rows, wherever they are
        args_alone, kwargs_alone = call([row])
        fresh = adapted(Recurrent(), task_type=None, target_modules=["first", "inner"])  # has learned nothing yet
        alone = fresh(*args_alone, **kwargs_alone, adapter_names=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone)
    with pytest.raises(ValueError, match="adapter_names has 2 entries .* 3 rows"):
        model(*args, **kwargs, adapter_names=NAMES[:2])


def test_a_table_that_every_batch_shares_takes_no_ids():
    model = adapted(Recurrent(), task_type=None, target_modules=["first", "table"])
    with pytest.raises(ValueError, match="table: task_ids .* laid out as 'mixed'"):
        model(ROWS, adapter_names=NAMES)


def test_a_padded_batch_in_an_encoder_of_torch():
    """In evaluation torch makes nested tensors of it, which no linear layer of an adapter can take."""
    torch.manual_seed(1)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    padding = torch.arange(3)[None] >= torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        wanted = base(ROWS, src_key_padding_mask=padding)
    model = adapted(base, task_type=None, target_modules=["linear1", "linear2"])
    with torch.no_grad():
        mixed = model(ROWS, src_key_padding_mask=padding, adapter_names=NAMES)
        for row, (name, length) in enumerate(zip(NAMES, LENGTHS, strict=True)):
            alone = model(ROWS[row : row + 1, :length], adapter_names=[name])
            torch.testing.assert_close(mixed[row : row + 1, :length], alone)
    torch.testing.assert_close(mixed[2, :2], wanted[2, :2])
    plain = model.unload()
    assert plain.use_nested_tensor
    with torch.no_grad():
        assert torch.equal(plain(ROWS, src_key_padding_mask=padding), wanted)


def test_all_linear_leaves_an_attention_of_torch_alone_where_the_model_could_not_be_tried():
    base = build("Siglip2VisionModel", config="Siglip2Vision", **WIDTH, num_patches=16, patch_size=4)
    with pytest.warns(UserWarning, match=r"without calling them.*head\.attention\.out_proj"):
        model = adapted(base, task_type=None)
    names = {layer.rows_name for layer in layers_of(model)}
    assert "head.mlp.fc1" in names and "head.attention.out_proj" not in names
