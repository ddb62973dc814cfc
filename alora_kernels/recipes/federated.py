"""What `alora fed` trains: a configuration's clients as `Participant`s on real models, and the two apps Flower starts.

An "encoder" has a class per label word of its client. A "causal" model is asked with the prompt alone, cut where its
answer begins, for the answer's first token; its loss is over the whole vocabulary, its accuracy among the label words.
A process reads a base model and tokenises a client's rows once; participants share the frozen weights and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import data
from ..federated.client import Client, Participant, client_app, fit, shuffled
from ..federated.config import ConfigError, FedConfig
from ..federated.local import clients_of
from ..federated.model import adapt, fingerprint
from ..federated.server import Template, serve

KINDS = {"minilm": "encoder", "tiny-random-encoder": "encoder", "smollm2-135m": "causal", "tiny-random": "causal"}
HEADS: dict[str, tuple[str, ...]] = {"encoder": ("head",), "causal": ()}
METRICS = ("accuracy", "loss")
EVAL_BATCH = 64


class _Base(NamedTuple):
    model: nn.Module  # nobody trains it, participants copy it
    tokenizer: Any
    fingerprint: str


def participant(config: FedConfig, client_name: str, *, data_file: str | Path | None = None) -> Participant:
    """One client of a run, with its data; its metrics are `accuracy` and `loss` on its test rows.

    `data_file` is the client's own `.jsonl` file with `prompt` and `answer`, instead of the task the configuration
    names; if that task is a built-in one, answers must be among its label words. A ConfigError for what the
    configuration lacks or has wrong; for model and data see `data`.
    """
    client = config.client(client_name)
    _check(config)
    base, rows, shared = _base_of(config), _rows(config, client_name, data_file), _shared_labels(config)
    if shared is not None and rows.labels != shared:
        raise ConfigError(
            f"head: shared, but {client_name} answers with {', '.join(rows.labels)} and others with "
            f"{', '.join(shared)}; set `head: private`"
        )
    return Participant(
        name=client.name,
        model=_adapted(config, base, len(rows.labels), client.name, config.rank_of(client.name)),
        train=partial(_train, rows=rows, config=config),
        evaluate=partial(_evaluate, rows=rows, metrics=config.metrics),
        num_examples=len(rows.train),
        base=base.fingerprint,
    )


def template(config: FedConfig) -> Template:
    """The adapted model as a server needs it: shapes and initial values, no data; errors as `participant`."""
    _check(config)
    shared = _shared_labels(config)
    if config.head == "shared" and kind_of(config) == "encoder" and shared is None:
        raise ConfigError(
            "head: shared needs to know the label words before it sees data; name a built-in task for at least one "
            f"client ({', '.join(data.TASKS)}), or set `head: private`"
        )
    base = _base_of(config)
    model = _adapted(config, base, len(shared) if shared else 2, "", config.rank)  # private heads are unused
    return Template(model, base.fingerprint)


def kind_of(config: FedConfig) -> str:
    """ "encoder" or "causal": as configured, or by the model's name; a ConfigError if neither says which."""
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
    if unknown := [name for name in config.metrics if name not in METRICS]:
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
    options: Any = config.model_dump(include={"seed", "train_size", "test_size", "max_length"})
    causal, tokenizer = kind_of(config) == "causal", _base_of(config).tokenizer
    return task_rows(task, None if data_file is None else str(data_file), causal=causal, tokenizer=tokenizer, **options)


def _base_of(config: FedConfig) -> _Base:
    return _base(config.model, kind_of(config), config.base_check == "data")


@lru_cache(maxsize=2)
def _base(name: str, kind: str, values: bool) -> _Base:
    """Model and tokenizer, read once per process; the hash is of what all clients have in common: hence float32."""
    model: Any
    if kind == "encoder":
        model, tokenizer = data.load_encoder(name, num_labels=2)
    else:
        model, tokenizer = data.load_model(name)
    model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    return _Base(model, tokenizer, fingerprint(model, heads=HEADS[kind], data=values))


def _adapted(config: FedConfig, base: _Base, num_labels: int, client: str, rank: int) -> nn.Module:
    """The method's adapter on a model of the client's own; a head begins the same for all who have its size."""
    kind = kind_of(config)
    origin: Any = base.model.encoder if kind == "encoder" else base.model
    frozen: dict[int, Any] = {id(p): p for p in origin.parameters() if not p.requires_grad}
    model = copy.deepcopy(origin, frozen)  # modules and buffers of its own, the base's own frozen tensors
    if kind == "encoder":
        model = data.EncoderClassifier(model, num_labels, config.seed)
    return adapt(
        model,
        config.spec,
        rank=rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        d_m=config.d_m,
        heads=HEADS[kind],
        seed=config.seed,
        client=client,
    )


@dataclass(frozen=True, eq=False)
class Rows:
    """One client's data."""

    labels: tuple[str, ...]  # the words it answers with
    choices: Tensor  # what a prediction is chosen among, per label: token ids, or 0, 1, ... for a classifier
    train: Sequence[Sequence[int]]  # token ids of each row, as `test`
    test: Sequence[Sequence[int]]
    train_target: Tensor  # per row, the right one of `choices`
    test_target: Tensor
    majority: float  # test accuracy of always giving the most frequent training answer
    causal: bool  # whether targets are tokens; such rows are padded on the left: all answers begin together
    pad: int  # fills shorter rows


@lru_cache(maxsize=32)
def task_rows(
    task: str | data.TaskSpec | None,
    data_file: str | None,
    *,
    causal: bool,
    tokenizer: Any,
    seed: int,
    train_size: int | None,
    test_size: int,
    max_length: int,
) -> Rows:
    """Rows of a task (or of the file that takes its place), read and tokenised once per process."""
    name = str(task if data_file is None else data_file)
    source = (task or name) if data_file is None else data.TaskSpec("own", name, task_column=None)
    splits = data.load_task(source, seed=seed, train_size=train_size, test_size=test_size)
    if any(turns for split in splits.values() for turns in split["messages"]):
        raise ValueError(f"{name!r} holds chats, and clients train on prompts with one word for an answer")
    answers = {split: list(splits[split]["answer"]) for split in ("train", "test")}
    labels = _labels(task, name, set(answers["train"]) | set(answers["test"]))
    number = data.first_tokens(labels, tokenizer) if causal else {label: i for i, label in enumerate(labels)}
    ids = {split: _prompts(splits[split], tokenizer, causal, max_length) for split in ("train", "test")}
    most = max(labels, key=answers["train"].count)
    return Rows(
        labels=labels,
        choices=torch.tensor([number[label] for label in labels]),
        train=ids["train"],
        test=ids["test"],
        train_target=torch.tensor([number[answer] for answer in answers["train"]]),
        test_target=torch.tensor([number[answer] for answer in answers["test"]]),
        majority=answers["test"].count(most) / len(answers["test"]),
        causal=causal,
        pad=tokenizer.pad_token_id,
    )


def _labels(task: str | data.TaskSpec | None, name: str, answers: set[str]) -> tuple[str, ...]:
    """Label words of a built-in task, else the answers that occur, sorted."""
    if task not in data.TASKS:
        if len(answers) < 2:
            raise ValueError(f"{name!r} has one answer only, {', '.join(answers)!r}; there is nothing to learn from it")
        return tuple(sorted(answers))
    known = data.labels_of(task)
    if other := sorted(answers - set(known)):
        raise ValueError(
            f"{name!r} answers {', '.join(map(repr, other[:3]))}, task {task!r} has {', '.join(known)}; rename the "
            f"answers, or give the client no task in the configuration"
        )
    return known


def _prompts(split: Any, tokenizer: Any, causal: bool, max_length: int) -> list[list[int]]:
    if not causal:
        return tokenizer(list(split["prompt"]), truncation=True, max_length=max_length).input_ids
    encoded = data.encode(split, tokenizer, max_length)
    ends = [next(i for i, label in enumerate(labels) if label >= 0) for labels in encoded["labels"]]
    return [ids[:end] for ids, end in zip(encoded["input_ids"], ends, strict=True)]


def collate(rows: Sequence[Sequence[int]], pad: int, *, left: bool, device: torch.device) -> Mapping[str, Tensor]:
    """`input_ids` and `attention_mask` `[rows, length]` of rows of token ids, filled up with `pad` on one side.

    On the left, `position_ids` too, counted from each row's first token.
    """
    tokens, side = [torch.tensor(row) for row in rows], "left" if left else "right"
    mask = pad_sequence([torch.ones_like(row) for row in tokens], True, 0, side)
    batch = {"input_ids": pad_sequence(tokens, True, pad, side), "attention_mask": mask}
    if left:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return {key: value.to(device) for key, value in batch.items()}


def _logits(model: nn.Module, rows: Rows, ids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Logits of some rows: over an encoder's classes, or over the vocabulary where the answer begins."""
    batch = collate(ids, rows.pad, left=rows.causal, device=device)
    if not rows.causal:
        return model(**batch).float()
    return model(**batch, logits_to_keep=torch.tensor([-1], device=device)).logits[:, -1].float()


def _train(model: nn.Module, *, rows: Rows, config: FedConfig) -> float:
    """One round of local training; batches come from torch's generator, which the client has seeded."""
    device = next(model.parameters()).device

    def loss(model: nn.Module, picked: Tensor) -> Tensor:
        logits = _logits(model, rows, [rows.train[i] for i in picked.tolist()], device)
        return nn.functional.cross_entropy(logits, rows.train_target[picked].to(device))

    batches = shuffled(len(rows.train), config.local_steps, config.batch_size)
    return fit(model, batches, loss, lr=config.learning_rate, weight_decay=config.weight_decay)


@torch.no_grad()
def _evaluate(model: nn.Module, *, rows: Rows, metrics: tuple[str, ...]) -> dict[str, float]:
    """Accuracy among the label words and mean loss over the test rows; rows of similar length share a batch."""
    device = next(model.parameters()).device
    choices = rows.choices.to(device)
    lengths = torch.tensor([len(row) for row in rows.test])
    right, loss = 0, 0.0
    model.eval()
    for numbers in lengths.argsort(stable=True).split(EVAL_BATCH):
        target = rows.test_target[numbers].to(device)
        logits = _logits(model, rows, [rows.test[i] for i in numbers.tolist()], device)
        loss += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
        right += int((choices[logits[:, choices].argmax(1)] == target).sum())
    measured = {"accuracy": right / len(lengths), "loss": loss / len(lengths)}
    return {name: measured[name] for name in metrics}


server = ServerApp()


@server.main()
def _main(grid: Grid, context: Context) -> None:
    """Serve the run; a run that stops early ends as failed, so that `flwr list` says so."""
    config = FedConfig.from_yaml(str(context.run_config["config"]))
    outcome = serve(
        grid, config, template(config), resume=bool(context.run_config.get("resume", False)), engine="flower"
    )
    if outcome.status != "finished":
        raise RuntimeError(f"stopped after round {outcome.rounds}: {outcome.reason}")


@lru_cache(maxsize=4)
def _clients(text: str, data: str | None) -> Callable[[Context], Client]:
    config = FedConfig.from_yaml(text)
    return clients_of(config, lambda name: participant(config, name, data_file=data))


def _client_of(context: Context) -> Client:
    """A client with its own copy of the configuration shares what that says, whatever the server's says."""
    own, data = context.node_config.get("config"), context.node_config.get("data")
    text = str(context.run_config["config"]) if own is None else Path(str(own)).read_text()
    return _clients(text, None if data is None else str(data))(context)


client = client_app(_client_of)
