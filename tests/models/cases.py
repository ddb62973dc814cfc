"""`CASES`, the models of docs/models.md by family: how each is built, its rows, what is expected of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

VOCAB, WIDTH, HEADS, LABELS = 64, 32, 4, 3
PAD, BOS, EOS = 1, 2, 3  # 1: the padding id of RoBERTa's family, whose positions depend on it


@dataclass(frozen=True)
class Case:
    """One model of the table."""

    model: str  # class name in transformers
    family: str  # heading under which users look for it
    settings: Callable[[], Any]  # arguments of its config
    rows: str  # which rows it takes, see `judge`
    task_type: str | None  # as in PEFT
    targets: str | tuple[str, ...] | None = "all-linear"  # `target_modules`; None is PEFT's default for the model
    generates: bool = False  # whether `generate` is judged
    aux: bool = False  # whether the model adds a loss of its own (load balancing of experts)
    refused: str = ""  # a regular expression that the error of `get_peft_model` matches, if it is refused
    merge_refused: str = ""  # part of the message, if a merge is refused
    variant: str = ""  # what sets it apart, in words
    exclude_modules: tuple[str, ...] = ()  # as in PEFT
    parameters: str | None = None  # `target_parameters`
    sharing: tuple[str, str] = ("shared", "each")  # `experts_A` and `experts_B`
    pad: int = PAD
    pads_left: bool = False  # whether its tokenizer pads on the left
    dtype: torch.dtype = torch.float64  # unless the model itself computes something else there

    @property
    def name(self) -> str:
        """Its name in tests and in the table."""
        return f"{self.model}{f' ({self.variant})' if self.variant else ''}"

    def build(self) -> Any:
        """The base model, the same at every call, without dropout."""
        torch.manual_seed(7)
        settings = self.settings()
        settings._experts_implementation = "eager"  # the others know no float64
        model = getattr(tf, self.model)(settings).to(self.dtype).eval()
        generator = torch.Generator().manual_seed(11)
        for module in model.modules():
            _enliven(module, generator)
            _quieten(module, self.dtype)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        return model


def _enliven(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of unit gain instead of 0.02: what leaks between rows is then as large as the outputs."""
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        fan_in = 1 if isinstance(module, nn.Embedding) else module.weight.shape[isinstance(module, nn.Linear)]
        module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_(0, 0.1, generator=generator)
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dim() == 3:  # experts
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)


def _quieten(module: nn.Module, dtype: torch.dtype) -> None:
    """No dropout of any kind, so that training mode computes what evaluation does."""
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    for name, value in list(vars(module).items()):
        if value is torch.float32:  # the dtype of a router
            setattr(module, name, dtype)
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(module, name, 0.0)


# fmt: off
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
ENDLESS = IDS | {"eos_token_id": None}  # texts of one length
SIZES = IDS | {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": 48, "max_position_embeddings": 64,
}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
LOUD = {"router_aux_loss_coef": 1.0, "output_router_logits": False}  # a loss of the router that cannot be overlooked
EXPERTS = {"num_experts_per_tok": 2} | LOUD
SEQ2SEQ = IDS | {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS,
    "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None,
}
SPARSE = {"num_experts": 4, "expert_capacity": 64} | LOUD
IMAGES = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "image_size": 8, "patch_size": 4,
}
QKV = "query, key and value fused"


def _encoder(model: str, rows: str, config: str, settings: dict[str, Any] | None = None, **more: Any) -> Case:
    sizes = SIZES | {"num_labels": LABELS} | (settings or {})
    if config == "XLNetConfig":  # knows no longest text
        del sizes["max_position_embeddings"]
    task_type = more.pop("task_type", "TOKEN_CLS" if rows in ("token", "boxes") else "SEQ_CLS")
    return Case(model, "Encoders", lambda: getattr(tf, config)(**sizes), rows, task_type, **more)


def _decoder(model: str, config: str, settings: dict[str, Any] | None = None, sizes: Any = None, **more: Any) -> Case:
    arguments = (SIZES | ENDLESS if sizes is None else sizes | ENDLESS) | (settings or {})
    options = {"family": "Decoders", "rows": "causal", "task_type": "CAUSAL_LM", "generates": True} | more
    return Case(model, settings=lambda: getattr(tf, config)(**arguments), **options)


def _seq2seq(model: str, settings: Callable[[], Any], **more: Any) -> Case:
    options = {"family": "Encoder-decoders", "rows": "seq2seq", "task_type": "SEQ_2_SEQ_LM", "generates": True} | more
    return Case(model, settings=settings, **options)


ENCODERS = (
    _encoder("BertForSequenceClassification", "pairs", "BertConfig", variant="sentence pairs"),
    _encoder("RobertaForTokenClassification", "token", "RobertaConfig", {"type_vocab_size": 1},
             exclude_modules=("classifier",)),
    _encoder("RobertaForTokenClassification", "token", "RobertaConfig", {"type_vocab_size": 1},
             variant="without `exclude_modules`", refused="modules_to_save cannot be applied"),
    _encoder("DistilBertForSequenceClassification", "sequence", "DistilBertConfig",
             # PEFT takes pre_classifier for the classifier, which it trains in full
             {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 48}, exclude_modules=("pre_classifier",)),
    _encoder("ElectraForTokenClassification", "token", "ElectraConfig", {"embedding_size": 16},
             exclude_modules=("classifier",)),
    _encoder("BertForQuestionAnswering", "question", "BertConfig", {"num_labels": 2}, task_type="QUESTION_ANS",
             exclude_modules=("qa_outputs",)),
    _encoder("BertForSequenceClassification", "regression", "BertConfig", {"num_labels": 1}, variant="regression"),
    _encoder("XLMRobertaForSequenceClassification", "multi-label", "XLMRobertaConfig",
             {"type_vocab_size": 1, "problem_type": "multi_label_classification"}, variant="several labels per row"),
    _encoder("MPNetForSequenceClassification", "sequence", "MPNetConfig"),
    _encoder("LongformerForSequenceClassification", "sequence", "LongformerConfig",
             {"type_vocab_size": 1, "attention_window": 4}, variant="time first, padded to its window"),
    _encoder("LayoutLMForTokenClassification", "boxes", "LayoutLMConfig", {"max_2d_position_embeddings": 64},
             exclude_modules=("classifier",), variant="boxes of the tokens"),
    _encoder("AlbertForSequenceClassification", "pairs", "AlbertConfig", {"embedding_size": 16},
             variant="shared layers"),
    _encoder("DebertaV2ForSequenceClassification", "sequence", "DebertaV2Config",
             {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
              "max_relative_positions": 8, "pooler_hidden_size": WIDTH}, variant="positions with layers of their own"),
    _encoder("DebertaV2ForSequenceClassification", "sequence", "DebertaV2Config",
             {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
              "max_relative_positions": 8, "pooler_hidden_size": WIDTH, "share_att_key": True},
             variant="positions through the query and key layers, as in v3"),
    _encoder("XLNetForSequenceClassification", "sequence", "XLNetConfig",
             {"d_model": WIDTH, "n_layer": 2, "n_head": HEADS, "d_inner": 48}, variant="time first", pads_left=True),
    _encoder("ModernBertForTokenClassification", "token", "ModernBertConfig",
             {"cls_token_id": BOS, "sep_token_id": EOS, "global_attn_every_n_layers": 2},
             exclude_modules=("classifier",)),
)

DECODERS = (
    _decoder("GPT2LMHeadModel", "GPT2Config", {"n_positions": 64},
             {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS}, variant="Conv1D"),
    _decoder("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    _decoder("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}, targets=None,
             variant="PEFT's default `target_modules`"),
    # float32: with a float64 mask its softmax gives nan for padded rows
    _decoder("BloomForCausalLM", "BloomConfig", sizes={"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 2,
             "n_head": HEADS}, variant=QKV, dtype=torch.float32),
    _decoder("FalconForCausalLM", "FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
             variant=QKV),
    # float32: with a float64 mask its softmax gives nan for padded rows
    _decoder("MptForCausalLM", "MptConfig", sizes={"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": 2,
             "n_heads": HEADS, "expansion_ratio": 2, "max_seq_len": 64}, variant=QKV, dtype=torch.float32),
    _decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", variant=QKV),
    _decoder("Phi3ForCausalLM", "Phi3Config", {"num_key_value_heads": 2}, variant=f"{QKV}, gate and up too"),
    _decoder("LlamaForCausalLM", "LlamaConfig", GQA),
    _decoder("LlamaForCausalLM", "LlamaConfig", GQA | {"tie_word_embeddings": True}, variant="a tied head, adapted",
             targets=("q_proj", "down_proj", "lm_head"),
             merge_refused="the weight of lm_head is also that of model.embed_tokens"),
    _decoder("LlamaForSequenceClassification", "LlamaConfig", GQA | {"num_labels": LABELS}, rows="sequence",
             task_type="SEQ_CLS", generates=False),
    _decoder("Qwen3ForCausalLM", "Qwen3Config", GQA),
    _decoder("Gemma3ForCausalLM", "Gemma3TextConfig", GQA | WINDOWS | {"query_pre_attn_scalar": 8},
             variant="sliding window"),
)


def _experts(model: str, config: str, settings: dict[str, Any], variant: str = "", **more: Any) -> Case:
    options: dict[str, Any] = {"targets": ("q_proj", "v_proj", "q_b_proj"), "parameters": "all-experts"} | more
    options |= {"variant": f"experts adapted{variant}", "family": "Mixtures of experts"}
    return _decoder(model, config, settings, **options)


def _mamba(**more: Any) -> Case:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4}
    return _decoder("MambaForCausalLM", "MambaConfig", sizes=sizes, family="State space", **more)


MIXTRAL = GQA | EXPERTS | {"num_local_experts": 4}
QWEN3_MOE = GQA | EXPERTS | {
    "moe_intermediate_size": 24, "num_experts": 4, "decoder_sparse_step": 1, "norm_topk_prob": True,
}
DEEPSEEK = {
    "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
GPT_OSS = GQA | EXPERTS | WINDOWS | {"num_local_experts": 4}

SPECIAL = (
    _decoder("MixtralForCausalLM", "MixtralConfig", MIXTRAL, aux=True, family="Mixtures of experts"),
    _experts("MixtralForCausalLM", "MixtralConfig", MIXTRAL, aux=True),
    _decoder("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN3_MOE, aux=True, family="Mixtures of experts"),
    _experts("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN3_MOE, aux=True),
    _experts("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN3_MOE, ", an A and a B for each", aux=True,
             sharing=("each", "each")),
    _experts("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN3_MOE, ", one A and one B for all", aux=True,
             sharing=("shared", "shared")),
    _decoder("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, family="Mixtures of experts",
             variant="latent attention, shared experts"),
    _experts("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    _decoder("GptOssForCausalLM", "GptOssConfig", GPT_OSS, aux=True, family="Mixtures of experts"),
    _experts("GptOssForCausalLM", "GptOssConfig", GPT_OSS, aux=True),
    _experts("GptOssForCausalLM", "GptOssConfig", GPT_OSS, ", an A for each and one B", aux=True,
             sharing=("each", "shared")),
    _experts("OlmoeForCausalLM", "OlmoeConfig", GQA | EXPERTS | {"num_experts": 4}, aux=True),
    _decoder("Llama4ForCausalLM", "Llama4TextConfig", GQA | {
             "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 48,
             "interleave_moe_layer_step": 2, "attention_chunk_size": 4}, family="Mixtures of experts"),
    _seq2seq("SwitchTransformersForConditionalGeneration", lambda: tf.SwitchTransformersConfig(
             **T5, **SPARSE, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2,
             router_jitter_noise=0.0), family="Mixtures of experts", aux=True, pad=0),
    _seq2seq("NllbMoeForConditionalGeneration", lambda: tf.NllbMoeConfig(
             **SEQ2SEQ, **SPARSE, max_position_embeddings=64, encoder_sparse_step=2, decoder_sparse_step=2,
             moe_token_dropout=0.0, moe_eval_capacity_token_fraction=-1.0), family="Mixtures of experts", aux=True),
    _mamba(targets=("in_proj",)),
    _mamba(targets=("in_proj", "x_proj", "out_proj"), refused="weights are used without calling them"),
    _decoder("Qwen3NextForCausalLM", "Qwen3NextConfig", GQA | {
             "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
             "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
             "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
             "decoder_sparse_step": 1}, family="State space", variant="linear attention and experts"),
    # padding on the left changes its texts: it takes no mask
    _decoder("RwkvForCausalLM", "RwkvConfig", sizes={"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2,
             "attention_hidden_size": WIDTH, "context_length": 64}, family="State space", generates=False),
    _decoder("JambaForCausalLM", "JambaConfig", EXPERTS | {
             "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
             "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4}, aux=True,
             family="State space"),
)

SEQ2SEQS = (
    _seq2seq("T5ForConditionalGeneration", lambda: tf.T5Config(**T5), pad=0),
    _seq2seq("BartForConditionalGeneration", lambda: tf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
    _seq2seq("LEDForConditionalGeneration", lambda: tf.LEDConfig(
             **SEQ2SEQ, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4),
             rows="seq2seq with global attention", variant="time first, padded to its window"),
    _seq2seq("WhisperForConditionalGeneration", lambda: tf.WhisperConfig(
             **SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=64), rows="speech",
             task_type=None, variant="without `task_type`"),
)

VISION = (
    Case("LlavaForConditionalGeneration", "Vision and language", lambda: tf.LlavaConfig(
         vision_config=tf.CLIPVisionConfig(**IMAGES), text_config=tf.LlamaConfig(**(SIZES | ENDLESS | GQA)),
         image_token_index=VOCAB - 1, vision_feature_layer=-1), "images and text", "CAUSAL_LM", generates=True),
    Case("Qwen2VLForConditionalGeneration", "Vision and language", lambda: tf.Qwen2VLConfig(
         text_config=SIZES | ENDLESS | {"num_key_value_heads": 2, "rope_parameters": {
             "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
         vision_config={"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": HEADS, "mlp_ratio": 2,
                        "patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 1},
         image_token_id=VOCAB - 1, vision_start_token_id=VOCAB - 2, vision_end_token_id=VOCAB - 3,
         video_token_id=VOCAB - 4), "patches and text", "CAUSAL_LM", generates=False,
         variant="patches of all images in one dimension"),
    Case("CLIPModel", "Vision and language", lambda: tf.CLIPConfig(
         text_config=SIZES | {"projection_dim": 16}, vision_config=IMAGES | {"projection_dim": 16}, projection_dim=16),
         "image-text pairs", None),
    Case("ViTForImageClassification", "Vision and language", lambda: tf.ViTConfig(**IMAGES, num_labels=LABELS),
         "images", None),
    Case("SwinForImageClassification", "Vision and language", lambda: tf.SwinConfig(
         image_size=8, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=2, num_labels=LABELS),
         "images", None, variant="windows as rows"),
)

CASES: tuple[Case, ...] = (*ENCODERS, *DECODERS, *SEQ2SEQS, *SPECIAL, *VISION)
