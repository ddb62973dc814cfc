"""What travels, looked at on the wire: shared arrays, metrics, counts. No private array, no row, no text, no socket."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from alora_kernels.federated import METHODS, Template, adapt
from alora_kernels.federated.client import Client, client_app
from alora_kernels.federated.config import DpSettings, StrategyConfig
from alora_kernels.federated.local import InProcessGrid, clients_of
from alora_kernels.federated.log import Outcome
from alora_kernels.federated.server import serve
from alora_kernels.federated.state import CLIENTS
from alora_kernels.files import read as read_arrays


def watched(folder: Path, **changes: object) -> tuple[Outcome, list[Message]]:
    """A run, and every message of it as read from the bytes that crossed."""
    config = toy.config(folder, **changes)
    seen: list[Message] = []
    return toy.go(config, head=True, on_message=seen.append), seen


def numbers_in(message: Message) -> list[np.ndarray]:
    return [a.numpy() for record in message.content.array_records.values() for a in record.values()]


@pytest.mark.parametrize("method", METHODS)
def test_only_shared_arrays_cross(method, tmp_path):
    outcome, messages = watched(tmp_path / "out", method=method, rounds=2)
    assert outcome.status == "finished" and len(messages) == 2 * 3 * 3  # 2 rounds and an evaluation, there and back
    spec, allowed = METHODS[method], set(outcome.arrays)
    assert {key.rpartition(".")[2] for key in allowed} == set(spec.living("shared"))
    for message in messages:
        for record in message.content.array_records.values():
            assert {key.removesuffix(".left").removesuffix(".right") for key in record} <= allowed
        for record in message.content.metric_records.values():
            assert set(record) <= {"num-examples", "before-score", "after-score", "score"}
        for name, record in message.content.config_records.items():
            words = {"nonce", "spec-hash", "client", "seconds"}
            if name == "config":
                words = {"nonce", "spec-hash", "server-round", "run", "method", "base", "scaling", "last"}
            assert set(record) <= words


@pytest.mark.parametrize("method", METHODS)
def test_no_private_value_crosses_in_any_disguise(method, tmp_path):
    """Private matrices are searched for in everything that crossed, row by row, whatever key they might travel under.

    B2 and B1 of unequal ranks are the exception that the method is made of: they go out as factors of what is shared.
    """
    _, messages = watched(tmp_path / "out", method=method, rounds=2)
    crossed = [row for m in messages for a in numbers_in(m) for row in np.atleast_2d(a).reshape(-1, a.shape[-1])]
    private = [role for role in METHODS[method].living("private") if role not in ("B1", "B2")]
    looked_at = 0
    for name in toy.NAMES:
        for file in (tmp_path / "out" / CLIENTS).glob(f"*/{name}/round-*"):
            tensors, _ = read_arrays(file)
            for key, tensor in tensors.items():
                role = key.rpartition(".")[2] if not key.startswith("head") else "head"
                if role not in private or not tensor.any():
                    continue
                for row in np.atleast_2d(tensor.numpy()).reshape(-1, tensor.shape[-1]):
                    looked_at += 1
                    assert not any(len(row) == len(other) and np.allclose(row, other) for other in crossed), key
    assert looked_at > 0 and (crossed or method == "local")


def test_the_search_above_can_find_something(tmp_path):
    """FedIT's A is private under Fed-ALoRA; sharing it must be seen."""
    _, messages = watched(tmp_path / "out", method="fedit", rounds=1)
    assert any(a.shape == (2, toy.K) for m in messages for a in numbers_in(m))


def test_clients_in_one_process_do_not_leak_into_each_other(tmp_path):
    """Private B of FedSA-LoRA: three different ones, and each what the client gets in a process of its own."""
    together, _ = watched(tmp_path / "together", method="fedsa-lora", rounds=1)
    own = {}
    for name in toy.NAMES:
        [file] = (tmp_path / "together" / CLIENTS).glob(f"*/{name}/round-000001.safetensors")
        own[name] = read_arrays(file)[0]["proj.B"].numpy()
        watched(tmp_path / name, method="fedsa-lora", rounds=1, clients=[name], guard={"quorum": 1})
        [file] = (tmp_path / name / CLIENTS).glob(f"*/{name}/round-000001.safetensors")
        np.testing.assert_array_equal(own[name], read_arrays(file)[0]["proj.B"].numpy())
    assert not np.allclose(own["ann"], own["bob"]) and not np.allclose(own["bob"], own["cyd"])
    assert together.status == "finished"


def test_equal_weights_hide_how_many_rows_a_client_has(tmp_path):
    outcome, messages = watched(tmp_path / "out", weights="equal", rounds=1)
    counts = {r["num-examples"] for m in messages for r in m.content.metric_records.values()}
    assert counts == {1} and outcome.status == "finished"


def test_a_shared_head_travels_and_a_private_one_does_not(tmp_path):
    shared, _ = watched(tmp_path / "shared", head="shared", rounds=1)
    private, _ = watched(tmp_path / "private", rounds=1)
    assert set(shared.arrays) - set(private.arrays) == {"head.weight", "head.bias"}
    started = next(e for e in shared.events if e["event"] == "run")
    assert sum(started["bytes_up"].values()) == shared.bytes_up


DP = {"noise_multiplier": 1.0, "clipping_norm": 0.1, "delta": 1e-3}


@pytest.mark.parametrize("side", ["server", "client"])
def test_differential_privacy_clips_and_counts(side, tmp_path):
    outcome, messages = watched(tmp_path / "out", dp=DpSettings(**DP, side=side), weights="equal", rounds=2)
    assert outcome.status == "finished" and outcome.rejections == []
    spent = [e for e in outcome.events if e["event"] == "privacy"]
    assert [e["round"] for e in spent] == [1, 2] and 0 < spent[0]["epsilon"] < spent[1]["epsilon"]
    train = [m for m in messages if m.metadata.message_type == "train"]
    sent = {m.metadata.group_id: m.content["arrays"]["proj.B"].numpy() for m in train if "config" in m.content}
    moved = [
        np.linalg.norm(m.content["arrays"]["proj.B"].numpy() - sent[m.metadata.group_id])
        for m in train
        if "reply" in m.content
    ]
    assert len(moved) == 6
    assert bool(max(moved) <= 0.1 + 1e-12) is (side == "client")  # on the server's side the client trusts it to clip


def test_a_budget_ends_the_run_and_what_was_learned_stays(tmp_path):
    dp = DpSettings(**DP, max_epsilon=8.0)
    outcome, _ = watched(tmp_path / "out", dp=dp, weights="equal", rounds=9)
    assert outcome.status == "stopped" and 0 < outcome.rounds < 9
    assert "would exceed max_epsilon" in str(outcome.reason)
    assert outcome.arrays["proj.B"].any()


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("step", [0.0, 1e-170])
def test_an_unchanged_client_counts_with_an_update_of_zero(side, step, tmp_path):
    """Flower's clipping divides by the update's norm, and 1e-170 squared is zero in float64."""
    dp = DpSettings(noise_multiplier=0.0, clipping_norm=100.0, side=side, accounting=False)

    def go(folder: Path, private: DpSettings | None, lazy: tuple[str, ...]) -> Outcome:
        config = toy.config(folder, dp=private, weights="equal", rounds=1)

        @torch.no_grad()
        def nudge(model: nn.Module) -> None:
            for name, p in model.named_parameters():
                if p.requires_grad and "_B" in name:
                    p.add_(step)

        return toy.go(config, dict.fromkeys(lazy, lambda p: replace(p, train=nudge)))

    plain, private = (go(tmp_path / str(i), dp, ("bob",)) for i, dp in enumerate((None, dp)))
    assert private.status == "finished" and private.rejections == []
    np.testing.assert_allclose(private.arrays["proj.B"], plain.arrays["proj.B"], rtol=1e-12)
    assert plain.arrays["proj.B"].any()
    still = go(tmp_path / "still", dp, toy.NAMES)
    assert still.status == "finished" and abs(still.arrays["proj.B"]).max() <= step


@pytest.mark.parametrize("theirs", [None, 1e30])
def test_a_client_that_clips_sends_nothing_to_a_server_with_another_norm(theirs, tmp_path):
    plain = toy.config(tmp_path / "out", weights="equal", rounds=1)
    own = plain.model_copy(update={"dp": DpSettings(**DP, side="client")})
    if theirs is not None:
        plain = plain.model_copy(update={"dp": DpSettings(**DP | {"clipping_norm": theirs}, side="client")})
    app = client_app(clients_of(own, lambda name: toy.participant(own, name)))
    outcome = serve(InProcessGrid(app, 3), plain, toy.template(plain))
    reasons = {e["reason"] for e in outcome.rejections}
    said = rf"client ann clips its updates to a norm of {DP['clipping_norm']:g}, the server says {theirs}"
    assert any(said in reason for reason in reasons) and outcome.bytes_up == 0


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_division_by_zero_in_training_is_the_client_s(side, tmp_path):
    config = toy.config(tmp_path / "out", dp=DpSettings(**DP, side=side, accounting=False), rounds=1)
    outcome = toy.go(config, {"bob": lambda p: replace(p, train=lambda _: 1 / 0)})
    assert {e["reason"] for e in outcome.rejections} == {"ZeroDivisionError, see the client's log"}


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_number_without_a_dimension_is_refused_because_flower_would_not_clip_it(side, tmp_path):
    config = toy.config(tmp_path / "out", head="shared", weights="equal", dp=DpSettings(1.0, 1.0, side=side))
    base = toy.Net(head=True)
    base.head.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
    model = adapt(base, config.spec, rank=config.rank, heads=("head",))
    with pytest.raises(ValueError, match=r"head.gain has shape \[\], which Flower's clipping leaves as it is"):
        serve(InProcessGrid(ClientApp(), 3), config, Template(model, "base"))
    assert not (tmp_path / "out").exists()


def test_accounting_of_other_strategies_is_refused(tmp_path):
    config = toy.config(
        tmp_path / "out", dp=DpSettings(**DP), weights="equal", strategy=StrategyConfig(name="fedmedian")
    )  # fmt: skip
    with pytest.raises(ValueError, match="account"):
        toy.go(config)
    assert not (tmp_path / "out").exists()


def test_import_opens_no_socket_and_switches_telemetry_off():
    code = """
import socket, sys, os
def refuse(*a, **k): raise AssertionError('a socket was opened')
socket.socket.connect = socket.socket.bind = socket.create_connection = socket.getaddrinfo = refuse
import alora_kernels.federated as federated
federated.run, federated.FedConfig, federated.adapt
import alora_kernels.federated.deploy, alora_kernels.federated.view
assert os.environ['FLWR_TELEMETRY_ENABLED'] == '0' and os.environ['RAY_USAGE_STATS_ENABLED'] == '0'
assert 'ray' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_in_one_process_opens_no_socket(tmp_path, monkeypatch):
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("connect", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    assert watched(tmp_path / "out", rounds=1)[0].status == "finished"


@pytest.mark.parametrize("servers", [{"method": "fedit"}, {"head": "shared"}])
def test_a_client_shares_what_its_own_configuration_says(servers, tmp_path):
    """The server asks for more than ann agreed to; ann refuses, and nothing of hers goes out."""
    wide, own = toy.config(tmp_path / "out", **servers), toy.config(tmp_path / "ann")
    others = clients_of(wide, lambda n: toy.participant(wide, n, head=True))
    ann = clients_of(own, lambda n: toy.participant(own, n, head=True), tmp_path / "ann")
    seen: list[Message] = []

    def client_of(context: Context) -> Client:
        return (ann if context.node_config["partition-id"] == 0 else others)(context)

    grid = InProcessGrid(client_app(client_of), 3, on_message=seen.append)
    first = toy.participant(wide, "bob", head=True)
    outcome = serve(grid, wide, Template(first.model, first.base))
    assert outcome.status == "finished" and {e["client"] for e in outcome.rejections} == {None}
    said = {e["reason"] for e in outcome.rejections}
    assert any("client ann has fed-alora" in reason or "keys differ" in reason for reason in said)
    answers = [m for m in seen if m.metadata.reply_to_message_id and m.metadata.src_node_id == 1]
    assert answers and all(m.has_error() for m in answers)
