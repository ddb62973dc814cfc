"""The participants that a configuration speaks of: a real model, a real task, local training, accuracy and loss.

In:   a `FedConfig` and a client's name; on a real machine the client's own file.
Out:  its `Participant`; for a server without data, the adapted model alone.
Who:  `alora fed`, the Flower apps and the example, on one machine or on many.

Both kinds of model come down to a choice. An "encoder" has a class per label word; a "causal" model is asked for the
answer's first token, its loss is over the whole vocabulary and its accuracy among the label words. A process reads a
base model and tokenises a client's rows once; participants share the frozen weights and own everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..federated.config import ConfigError, FedConfig
from ..federated.model import adapt, fingerprint
from ..federated.participant import Participant, fit, shuffled
from .fed_rows import Rows, collate, task_rows

KINDS = {"minilm": "encoder", "tiny-random-encoder": "encoder", "smollm2-135m": "causal", "tiny-random": "causal"}
METRICS = ("accuracy", "loss")
EVAL_BATCH = 64


@dataclass(frozen=True)
class _Base:
    """A model as it was read, its tokenizer, its fingerprint; nobody trains it, participants copy it."""

    model: nn.Module
    tokenizer: Any
    fingerprint: str


def participant(config: FedConfig, client_name: str, *, data_file: str | Path | None = None) -> Participant:
    """One client of a run, with its data.

    Args:
        config: the run.
        client_name: one of its clients.
        data_file: the client's own `.jsonl` file with `prompt` and `answer`, instead of the task the configuration
            names; if that task is a built-in one, answers must be among its label words.

    Returns:
        A participant whose metrics are `accuracy` and `loss` on its test rows.

    Raises:
        ConfigError: the configuration has no such client, no data for it, an unclear kind of model, other metrics, or
            a shared head over different label words.
        MissingPackageError, OSError, ValueError: model or data cannot be read; see `data`.
    """
    client = config.client(client_name)
    _check(config)
    base = _base_of(config)
    rows = _rows(config, client_name, data_file)
    shared = _shared_labels(config)
    if shared is not None and rows.labels != shared:
        raise ConfigError(
            f"head: shared, but {client_name} answers with {', '.join(rows.labels)} and others with "
            f"{', '.join(shared)}; set `head: private`"
        )
    model = _adapted(config, base, len(rows.labels), client.name, config.rank_of(client.name))
    ask = _ask_encoder if kind_of(config) == "encoder" else _ask_causal
    pad = base.tokenizer.pad_token_id
    return Participant(
        name=client.name,
        model=model,
        train=partial(_train, rows=rows, ask=ask, pad=pad, config=config),
        evaluate=partial(_evaluate, rows=rows, ask=ask, pad=pad, metrics=config.metrics),
        num_examples=len(rows.train),
        base=base.fingerprint,
    )


def template(config: FedConfig) -> nn.Module:
    """The adapted model as a server needs it: shapes and initial values, no data.

    Raises:
        ConfigError: as `participant`; or a shared head over tasks whose label words only their clients know.
        MissingPackageError, OSError: the model cannot be read.
    """
    _check(config)
    shared = _shared_labels(config)
    if config.head == "shared" and kind_of(config) == "encoder" and shared is None:
        raise ConfigError(
            "head: shared needs to know the label words before it sees data; name a built-in task for at least one "
            f"client ({', '.join(data.TASKS)}), or set `head: private`"
        )
    return _adapted(config, _base_of(config), len(shared) if shared else 2, "", config.rank)  # private heads are unused


def base_fingerprint(config: FedConfig) -> str:
    """The `Participant.base` that every client of this run must have, from the model alone."""
    return _base_of(config).fingerprint


def kind_of(config: FedConfig) -> str:
    """ "encoder" or "causal": as configured, or by the model's name.

    Raises:
        ConfigError: neither says which.
    """
    if config.kind is not None:
        return config.kind
    if config.model not in KINDS:
        raise ConfigError(
            f"kind: {config.model!r} does not tell; set `kind: encoder` (a classifier) or `kind: causal` (answers in "
            f"words). Known by name are {', '.join(KINDS)}"
        )
    return KINDS[config.model]


def majority(config: FedConfig) -> dict[str, float]:
    """Accuracy, per client, of always giving its most frequent training answer."""
    return {client.name: _rows(config, client.name, None).majority for client in config.clients}


def _check(config: FedConfig) -> None:
    unknown = [name for name in config.metrics if name not in METRICS]
    if unknown:
        raise ConfigError(f"metrics: {', '.join(unknown)} not measured here; known are {', '.join(METRICS)}")


def _shared_labels(config: FedConfig) -> tuple[str, ...] | None:
    """Label words that a shared head stands for; None without such a head, or where only clients know them."""
    if config.head != "shared" or kind_of(config) != "encoder":
        return None
    spaces = {client.name: data.labels_of(client.task) for client in config.clients if client.task in data.TASKS}
    if len(set(spaces.values())) > 1:
        said = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in spaces.items())
        raise ConfigError(f"head: shared needs the same label words for all, got {said}; set `head: private`")
    return next(iter(spaces.values()), None)


def _rows(config: FedConfig, client_name: str, data_file: str | Path | None) -> Rows:
    task = config.client(client_name).task
    if task is None and data_file is None:
        raise ConfigError(f"clients.{client_name}: name a task ({', '.join(data.TASKS)}, a .jsonl file or a hub id)")
    kind = kind_of(config)
    tokenizer = _base_of(config).tokenizer
    return task_rows(
        task,
        None if data_file is None else str(data_file),
        causal=kind == "causal",
        tokenizer=tokenizer,
        seed=config.seed,
        train_size=config.train_size,
        test_size=config.test_size,
        max_length=config.max_length,
    )


def _base_of(config: FedConfig) -> _Base:
    return _base(config.model, kind_of(config), config.base_check == "data")


@lru_cache(maxsize=2)
def _base(name: str, kind: str, values: bool) -> _Base:
    """Model and tokenizer, read once per process; the hash is of what all clients have in common."""
    model: Any
    if kind == "encoder":
        model, tokenizer = data.load_encoder(name, num_labels=2)
    else:
        model, tokenizer = data.load_model(name)
    model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    return _Base(model, tokenizer, fingerprint(model, heads=_heads(kind), data=values))


def _heads(kind: str) -> tuple[str, ...]:
    return ("head",) if kind == "encoder" else ()


def share_frozen(model: nn.Module) -> nn.Module:
    """A copy of a model with modules and buffers of its own, whose frozen parameters are the original's tensors."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo)


def _adapted(config: FedConfig, base: _Base, num_labels: int, client: str, rank: int) -> nn.Module:
    """The method's adapter on a model of the client's own; a head begins the same for all who have its size."""
    kind = kind_of(config)
    model: Any = share_frozen(base.model.encoder if kind == "encoder" else base.model)  # type: ignore[arg-type]
    if kind == "encoder":
        model = data.EncoderClassifier(model, num_labels, config.seed)
    return adapt(
        model,
        config.spec,
        rank=rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        d_m=config.d_m,
        heads=_heads(kind),
        seed=config.seed,
        client=client,
    )


Ask = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def _ask_encoder(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits over the classes `[rows, labels]`."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def _ask_causal(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits over the vocabulary where the answer begins `[rows, vocabulary]`; rows are padded on the left."""
    last = torch.tensor([-1], device=batch["input_ids"].device)
    return model(**batch, logits_to_keep=last).logits[:, -1]


def _train(model: nn.Module, *, rows: Rows, ask: Ask, pad: int, config: FedConfig) -> float:
    """One round of local training; batches come from torch's generator, which the client has seeded."""
    device = next(model.parameters()).device

    def loss(model: nn.Module, picked: Tensor) -> Tensor:
        numbers = picked.tolist()
        batch = collate([rows.train[i] for i in numbers], pad, left=rows.causal, device=device)
        target = rows.train_target[picked].to(device)
        return nn.functional.cross_entropy(ask(model, batch).float(), target)

    batches = shuffled(len(rows.train), config.local_steps, config.batch_size)
    return fit(model, batches, loss, lr=config.learning_rate, weight_decay=config.weight_decay)


@torch.no_grad()
def _evaluate(
    model: nn.Module, *, rows: Rows, ask: Ask, pad: int, metrics: tuple[str, ...], batch_size: int = EVAL_BATCH
) -> dict[str, float]:
    """Accuracy among the label words and mean loss over the test rows; rows of similar length share a batch."""
    device = next(model.parameters()).device
    choices = rows.choices.to(device)
    order = sorted(range(len(rows.test)), key=lambda i: len(rows.test[i]))
    right, loss = 0, 0.0
    model.eval()
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = collate([rows.test[i] for i in numbers], pad, left=rows.causal, device=device)
        target = rows.test_target[numbers].to(device)
        logits = ask(model, batch).float()
        loss += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
        right += int((choices[logits[:, choices].argmax(1)] == target).sum())
    measured = {"accuracy": right / len(order), "loss": loss / len(order)}
    return {name: measured[name] for name in metrics}
