"""What a model, wrapped by PEFT or not, expects of a batch: its columns, where padding goes, what labels are.

Read from its class. `TaskCollator` pads by it, `ModelLoss` reads the loss by it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

IGNORED = -100  # the label that no loss counts
LEAKS = {"convbert", "prophetnet"}  # a convolution over masked tokens; the other was seen to, not understood


@dataclass(frozen=True)
class BatchRules:
    """What a batch must look like; the defaults are those of a causal language model that nothing is known of."""

    columns: frozenset[str] | None = None  # arguments of the forward; None where any column may pass
    pad_left: bool = True  # short rows are filled on the left
    positions: bool = True  # a batch padded on the left needs `position_ids`, and is exact with them
    causal: bool = True  # a token sees only those before it, so that padding on the right needs no mask
    shifts: bool = False  # the label at t is known to be compared with what position t - 1 predicts
    encoder_decoder: bool = False  # labels are a sequence of their own
    labels: int | None = None  # number of labels of a classifier of rows
    problem: str | None = None  # `config.problem_type`, and "regression" for a classifier of rows with one label
    pad_token_id: int | None = None  # of the model's config, where it names a token
    needs_labels: bool = False  # the forward cannot be called without
    counts_rows: bool = False  # the loss is a mean over rows, however many labels they have (CTC)
    balancing: float = 0.0  # weight of the balancing loss that a mixture of experts returns
    leaks: str | None = None  # the model's type, where its own layers let padding change the tokens beside it
    model: str = ""  # name of the class

    def takes(self, name: str) -> bool:
        """Whether the forward may be given a column."""
        return self.columns is None or name in self.columns

    @classmethod
    def of(cls, model: Any) -> BatchRules:
        """The rules of a model; the defaults for None, and rules as they are."""
        if model is None or isinstance(model, cls):
            return cls() if model is None else model
        base = base_model(model)
        config: Any = getattr(base, "config", None)
        name, kind, text = type(base).__name__, getattr(config, "model_type", None), text_config(config)
        pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None) or 0
        labels = getattr(config, "num_labels", None) if name.endswith("ForSequenceClassification") else None
        parameters = inspect.signature(base.forward).parameters
        columns = _columns(parameters)
        two_texts = bool(getattr(config, "is_encoder_decoder", False))
        causal, shifts = not two_texts and _is_causal(name, kind), not two_texts and _shifts(base)
        # Left padding lets the answers of a language model end in the last columns. It is exact where positions can be
        # given and nothing but masked attention looks at other tokens; padding on the right is exact in any decoder.
        given = {"position_ids", "attention_mask"} <= (columns or set()) and "pixel_values" not in (columns or ())
        told = causal and given and _only_attends(base, text)
        summary_last = hasattr(base, "sequence_summary") and getattr(config, "summary_type", None) == "last"
        return cls(
            columns=columns,
            pad_left=(told and shifts) or summary_last,
            positions=told,
            causal=causal,
            shifts=shifts,
            encoder_decoder=two_texts,
            labels=labels,
            problem=getattr(config, "problem_type", None) or ("regression" if labels == 1 else None),
            pad_token_id=pad if isinstance(pad, int) and 0 <= pad < size else None,
            needs_labels="labels" in parameters and parameters["labels"].default is inspect.Parameter.empty,
            counts_rows=name in MODEL_FOR_CTC_MAPPING_NAMES.values(),
            balancing=getattr(base, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", 0.0)),
            leaks=kind if kind in LEAKS else None,
            model=name,
        )


def base_model(model: Any) -> Any:
    """The model inside PEFT's wrapper and `torch.compile`'s."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(config: Any) -> Any:
    """The part of a config that is about text; the whole where there are several."""
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # an encoder and a decoder of text
        return config


def _columns(parameters: Any) -> frozenset[str] | None:
    """Arguments that a forward names; None for one that takes any."""
    names = {name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return None if takes_any and "input_ids" not in names else frozenset(names)


def _only_attends(base: Any, config: Any) -> bool:
    """Whether no layer carries a state from token to token, which padding before them would enter."""
    kinds = getattr(config, "layer_types", None) or ()
    carries = any(not kind.endswith("attention") or kind.startswith("linear") for kind in kinds)
    return not carries and not getattr(base, "_is_stateful", False)


def _is_language_model(name: str) -> bool:
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or "CausalLM" in name or "LMHead" in name


def _is_causal(name: str, kind: str | None) -> bool:
    """Whether the class is a decoder; families with a masked language model are encoders, the unknown is believed."""
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    return not kind or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or _is_language_model(name)


def _shifts(base: Any) -> bool:
    """Whether the loss of the class compares position t with label t + 1, as far as its source tells."""
    known = LOSS_MAPPING.get(getattr(base, "loss_type", None) or "") is ForCausalLMLoss
    if not known and not _is_language_model(type(base).__name__):
        return False
    try:
        source = inspect.getsource(inspect.unwrap(type(base).forward))
    except (OSError, TypeError):
        return True
    return "loss_function(" in source or "shift_" in source
