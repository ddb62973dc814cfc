"""Training batches without padding: the tokens of all rows side by side in one row, each row attending to itself.

A batch that mixes tasks holds rows of the longest task, so that a third of the demo's slots are padding whatever the
order of rows is. Packed, no product, norm or attention sees it. Whether a model computes the same that way is proven
on rows of the first batch, in values, gradients and independence of the rows; else batches stay padded, and
`Packing.padded_because` says why.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..ops.attention import Segments, mask_function, segment_attention, unsupported
from ..recompute import around
from .collator import positions
from .loss import ModelLoss, Scored, label_counts
from .output_head import without_dropout
from .rules import IGNORED, base_model
from .tasks import all_per_row

logger = logging.getLogger(__name__)

Run = Callable[[dict[str, Any], Tensor | None], Scored]  # a batch, and labels of each row where they are packed
NAME = "alora_segments"  # of our attention among transformers' own
REPLACED = ("sdpa", "eager")  # attention that a user did not choose for what only it can do
TRIED = 3  # rows of the proof: the longest, the shortest and one between
SAME = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative errors of a row's loss; four roundings in 16 bits
LOOSER = 5.0  # that of a gradient
UNTOUCHED = 1e-5  # relative change of a row's loss when another row changes: sums of the same numbers

# with them, whether gradients are recorded, and the dtypes that attention was asked in
_running: ContextVar[tuple[Segments, bool, set[torch.dtype]]] = ContextVar("alora_segments")


@dataclass(frozen=True)
class Packed:
    """A batch in one row."""

    inputs: dict[str, Tensor]  # each `[1, L]`
    segments: Segments
    counts: Tensor  # labels of each row `[B]`


def pack(inputs: dict[str, Any], labels: Tensor) -> Packed | None:
    """The tokens of a padded batch, which is `all_per_row`, side by side; labels are -100 at every row's first token.

    None where masked places lie between tokens or have labels, where nothing is a token, and without a mask where
    positions start again within a row: transformers then takes it for several texts.
    """
    ids = inputs["input_ids"]
    if "attention_mask" not in inputs and "position_ids" in inputs and (inputs["position_ids"].diff(dim=1) != 1).any():
        return None
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (starts > 1).any() or not starts.any() or (labels[~mask] != IGNORED).any():
        return None
    columns = {"position_ids": positions(mask.long())} | inputs | {"labels": labels}
    columns.pop("attention_mask", None)
    if "task_ids" in columns and columns["task_ids"].dim() == 1:
        columns["task_ids"] = columns["task_ids"][:, None].expand_as(ids)
    bounds = [0, *mask.sum(1).cumsum(0).tolist()]
    flat = {name: value[mask][None] for name, value in columns.items()}
    return Packed(flat, Segments(bounds, device=ids.device), label_counts(labels))


class Packing:
    """Runs a training batch packed where that was proven to be the same, and padded elsewhere."""

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted  # None: on CPUs
        # why batches stay padded; empty where they do not, None until a batch was tried
        self.padded_because: str | None = "padding_free=False" if wanted is False else None
        self._proven: Any = None  # the model of the last trial

    def __call__(self, run: Run, inputs: dict[str, Any], model: Any, loss: ModelLoss) -> Scored:
        """Loss of a batch that `run` routes and computes."""
        elsewhere = self.wanted is None and inputs["labels"].device.type != "cpu"
        if self.padded_because or elsewhere or loss.by_rows is None:
            return run(inputs, None)
        base = base_model(model)
        if self.padded_because == "" and base is not self._proven:
            self.padded_because = None  # as for every model that was not tried
        why = _cannot(model, base, inputs, loss)
        if why is None and self.padded_because is None:
            why = self._tried(run, inputs, model, loss)
            if why is None and self.padded_because is None:
                return run(inputs, None)  # too few rows to tell by: another batch will
        if why is not None:
            self._stay_padded(why)
            return run(inputs, None)
        packed = pack(inputs, loss.labels(inputs))
        return run(inputs, None) if packed is None else _run_packed(run, packed, base.config)

    def _stay_padded(self, why: str) -> None:
        self.padded_because = why
        if self.wanted:
            warnings.warn(f"batches stay padded although padding_free=True: {why}", stacklevel=2)
        logger.info("training batches stay padded: %s", why)

    def _tried(self, run: Run, inputs: dict[str, Any], model: nn.Module, loss: ModelLoss) -> str | None:
        """Why the model cannot be given packed rows, after it was given some; `padded_because` is "" if it can."""
        labels = loss.labels(inputs)
        lengths = inputs.get("attention_mask", torch.ones_like(labels)).sum(1).masked_fill(label_counts(labels) == 0, 0)
        rows = lengths.argsort(descending=True)[: int((lengths > 0).sum())]
        if len(rows) < 2:
            return None
        rows = torch.stack([rows[0], rows[-1], *rows[1:-1][len(rows) // 2 - 1 :][: TRIED - 2]])
        few = {name: value[rows] for name, value in inputs.items()}
        packed = pack(few, loss.labels(few))
        if packed is None:
            return None
        try:
            devices = [labels.device] if labels.is_cuda else []
            with without_dropout(model), torch.random.fork_rng(devices):
                why = _difference(run, few, packed, model)
        except Exception as error:  # whatever it is, padding is the way that is known to be right
            why = f"{type(error).__name__}: {error}"
        self.padded_because, self._proven = why or "", base_model(model)
        return why


def _cannot(model: Any, base: Any, inputs: dict[str, Any], loss: ModelLoss) -> str | None:
    """What can be told without a try."""
    if not loss.by_rows or loss.head_of(model) is None:
        return "all logits are computed for the loss"
    if not isinstance(model, PreTrainedModel | PeftModel):
        return f"{type(model).__name__} is around the model"
    if not loss.rules.positions or not loss.shifts:
        return f"{type(base).__name__} is no language model that can be told positions"
    if getattr(base.config, "sub_configs", None):
        return f"{type(base).__name__} has several configs"
    if base.config._attn_implementation not in REPLACED:
        return f"attention is {base.config._attn_implementation!r}"
    if getattr(base.get_input_embeddings(), "neftune_noise_alpha", None):
        return "NEFTune's noise, which evaluation mode does not show, is scaled by the length of a batch's rows"
    if any(getattr(config, "alora_invocation_tokens", None) for config in getattr(model, "peft_config", {}).values()):
        return "PEFT's activated LoRA looks for its tokens in every row"
    if not all_per_row(inputs) or inputs["labels"].dim() != 2:
        return "a batch holds more than tokens"
    return None


def _difference(run: Run, few: dict[str, Any], packed: Packed, model: nn.Module) -> str | None:
    """How packed rows differ from padded ones, beyond rounding."""
    config, trained = base_model(model).config, [p for p in model.parameters() if p.requires_grad]

    def measured(run_one: Callable[[], Scored]) -> tuple[Tensor, list[Tensor | None]]:
        with torch.enable_grad():
            scored = run_one()
            grads = torch.autograd.grad(scored.mean, trained, allow_unused=True)
        assert scored.losses is not None
        return torch.cat([scored.losses, scored.mean.view(1)]).detach().double(), list(grads)

    padded, right = measured(lambda: run(few, None))
    dtypes = {next(model.parameters()).dtype}  # autocast may begin inside of the model's forward
    found, ours = measured(lambda: _run_packed(run, packed, config, dtypes))
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    same = SAME.get(dtype, 4 * torch.finfo(dtype).eps)
    if not torch.allclose(found, padded, rtol=same, atol=0):
        return f"losses of packed rows are {found.tolist()}, of padded ones {padded.tolist()}"
    largest = max((float(g.norm()) for g in right if g is not None), default=0.0)
    for one, other in zip(ours, right, strict=True):
        if (one is None) != (other is None):
            return "other tensors get a gradient"
        if one is not None and other is not None:
            error, norm = float((one.double() - other.double()).norm()), float(other.norm())
            if not error <= LOOSER * same * max(norm, 0.01 * largest):
                return f"a gradient of norm {norm:.3g} differs by {error:.3g}"
    ids, first = packed.inputs["input_ids"], packed.segments.q_bounds[1]
    changed = ids.clone()
    changed[:, :first] = (ids[:, :first] + 1) % (ids.max() + 1)
    beside = Packed(packed.inputs | {"input_ids": changed}, packed.segments, packed.counts)
    with torch.enable_grad():  # as before: without gradients a quantised base may take another kernel
        after = _run_packed(run, beside, config).losses
    assert after is not None
    if not torch.allclose(after.detach()[1:].double(), found[1:-1], rtol=UNTOUCHED, atol=0):
        return "the loss of a packed row depends on the row before it"
    return None


def _run_packed(run: Run, packed: Packed, config: Any, dtypes: set[torch.dtype] | None = None) -> Scored:
    with _attention(config, packed.segments, set() if dtypes is None else dtypes):
        return run(packed.inputs, packed.counts)


@contextlib.contextmanager
def _attention(config: Any, segments: Segments, dtypes: set[torch.dtype]) -> Iterator[None]:
    """Our attention in the layers of a model, for these segments; what was there before is put back."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, mask_function)
    token = _running.set((segments, torch.is_grad_enabled(), dtypes))
    again = around.set(partial(_replaced, config))  # for activations that are computed again in the backward pass
    try:
        with _replaced(config):
            yield
    finally:
        around.reset(again)
        _running.reset(token)


@contextlib.contextmanager
def _replaced(config: Any) -> Iterator[None]:
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in a layer, `[1, H, L, D]` each; a ValueError for what would have to be ignored."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    refused = unsupported(options, sys.maxsize) or ("a mask" if attention_mask is not None else None)
    if refused or not causal:
        raise ValueError(f"{type(module).__name__} asks for {refused or 'attention to later tokens'}")
    segments, recorded, dtypes = _running.get()
    if recorded != torch.is_grad_enabled():  # a second forward would run without these segments
        raise ValueError("activations are checkpointed")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    dtypes.add(dtype)
    q, k, v = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    return segment_attention(q, k, v, segments, scaling=scaling, dropout_p=dropout)[None], None
