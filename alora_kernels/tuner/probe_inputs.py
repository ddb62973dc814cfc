"""A tiny batch for a transformers model, made from its config.

In:   a model and a number of rows.
Out:  random tensors by the names of its forward's arguments.
Who:  `probe`.

Only what the model is mainly fed: text for a vision-language model, because its images do not belong to rows one by
one. Special tokens are left out: models look for them, and an image token without an image is an error.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

LENGTH, DECODER_LENGTH, IMAGE, SOUND = 12, 7, 64, 4000  # tokens, pixels, samples where the config does not say
VOCABULARY = 2000


def parameters_of(model: Any) -> list[str]:
    """The names of its forward's arguments."""
    return list(inspect.signature(model.forward).parameters)


def probe_inputs(model: Any, rows: int, generator: torch.Generator, images: bool) -> dict[str, Tensor]:
    """Random inputs.

    Args:
        model: a `PreTrainedModel`.
        rows: B.
        generator: of random numbers, on the CPU.
        images: give a text model its other inputs too.

    Raises:
        AttributeError: the config lacks what the inputs are made from.
    """
    names, main = parameters_of(model), model.main_input_name
    shape: tuple[int, ...] = (rows, LENGTH)
    if type(model).__name__.endswith("ForMultipleChoice"):
        shape = (rows, 2, LENGTH)
    batch: dict[str, Tensor] = {}
    if main in ("input_ids", "inputs") or (images and "input_ids" in names):
        name = "inputs" if main == "inputs" else "input_ids"
        batch[name] = _tokens(model, shape, generator)
        if "attention_mask" in names:
            batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    for name, make in OTHERS.items():
        if name == main or (images and name in names):
            batch[name] = torch.randn(make(model.config, rows), generator=generator).to(model.dtype)
    if "decoder_input_ids" in names and model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = _tokens(model, (rows, DECODER_LENGTH), generator)
    return {name: value.to(_device(model)) for name, value in batch.items()}


def _device(model: Any) -> Any:
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:  # offloaded: accelerate moves the inputs on
        return getattr(hook, "execution_device", None) or "cpu"
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # of a model without any
        weight = None
    return weight.device if isinstance(weight, Tensor) else model.device


def _tokens(model: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ids of ordinary tokens."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config(), model.config.get_text_config(True))}
    special: set[int] = set()
    for config in configs.values():
        for name, value in config.to_dict().items():
            if name.endswith(("_id", "_ids", "_index", "_token")):
                special |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    size = min(getattr(c, "vocab_size", VOCABULARY) for c in configs.values())
    ordinary = torch.tensor([i for i in range(min(size, VOCABULARY)) if i not in special])
    return ordinary[torch.randint(len(ordinary), shape, generator=generator)]


def _pixels(config: Any, rows: int) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or IMAGE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    image = (getattr(vision, "num_channels", 3), height, width)
    frames = getattr(vision, "num_frames", None)
    return (rows, *image) if frames is None else (rows, frames, *image)


def _features(config: Any, rows: int) -> tuple[int, ...]:
    if hasattr(config, "input_feat_per_channel"):
        return rows, IMAGE, config.input_feat_per_channel
    if hasattr(config, "feature_projection_input_dim"):
        return rows, IMAGE, config.feature_projection_input_dim
    return rows, config.num_mel_bins, 2 * config.max_source_positions


def _sound(config: Any, rows: int) -> tuple[int, ...]:
    if hasattr(config, "num_mel_bins"):
        return rows, config.max_length, config.num_mel_bins
    return rows, SOUND


OTHERS = {"pixel_values": _pixels, "input_features": _features, "input_values": _sound}
