"""Every method against NumPy for several rounds; FFA's exactness; the identity of unequal ranks; bytes by formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy_reference as reference
import pytest
import torch
import toy

from alora_kernels.federated import METHODS, FedConfig, adapt, share_spec
from alora_kernels.federated.log import Outcome
from alora_kernels.federated.model import layer_shapes, matrices
from alora_kernels.federated.share_specs import LayerShape
from alora_kernels.federated.state import CLIENTS
from alora_kernels.files import read as read_arrays

ROUNDS = 3
RANKS = {"ann": 1, "bob": 2, "cyd": 4}
ROWS = np.array([len(toy.data_of(name)[0]) for name in toy.NAMES], dtype=float)
WEIGHTS = ROWS / ROWS.sum()


def config_for(folder: Path, method: str, **changes: object) -> FedConfig:
    ranks = [{"name": name, "rank": rank} for name, rank in RANKS.items()]
    return toy.config(folder, method, **({"clients": ranks} if method == "fed-alora-het" else {}) | changes)


def begun(method: str, **how: Any) -> dict[str, torch.Tensor]:
    """First values of a client's matrices, by key."""
    spec = share_spec(method)
    return {key: m.tensor.detach() for key, m in matrices(adapt(toy.Net(), spec, **how), spec).items()}


def models(config: FedConfig) -> dict[str, reference.Lora]:
    kind = reference.METHODS[config.method]
    if issubclass(kind, reference.FedSaVera):
        adapted = adapt(toy.Net(), config.spec, rank=config.rank, seed=config.seed)
        tensors = dict(adapted.named_buffers())
        va, vb = (next(t for name, t in tensors.items() if f"vera_{side}" in name) for side in "AB")
        kind.projections = {"VA": va.numpy()[: config.rank, : toy.K], "VB": vb.numpy()[: toy.N, : config.rank]}
    w = toy.Net().proj.weight.detach().numpy()
    return {name: kind(w, config.rank_of(name), config.d_m, config.seed, name) for name in toy.NAMES}


@pytest.mark.parametrize("method", METHODS)
def test_several_rounds_equal_the_numpy_reference(method, tmp_path):
    config = config_for(tmp_path / "out", method)
    outcome = toy.go(config)
    assert (outcome.status, outcome.rounds, outcome.rejections) == ("finished", ROUNDS, [])
    expected = models(config)
    data = {name: toy.data_of(name) for name in toy.NAMES}
    shared = reference.federated(expected, data, ROUNDS, 2, toy.LR)

    assert {key.rpartition(".")[2] for key in outcome.arrays} == set(shared)
    for key, values in outcome.arrays.items():
        np.testing.assert_allclose(values.squeeze(), shared[key.rpartition(".")[2]], rtol=1e-9, atol=1e-12, err_msg=key)
    for name, model in expected.items():
        model.receive(shared)  # what the final evaluation measures: the last mean with the client's own half
        x, target = data[name]
        score = -0.5 * np.square(model.forward(x) - target).sum(1).mean()
        assert outcome.final[name]["score"] == pytest.approx(score, rel=1e-10)
        [file] = (tmp_path / "out" / CLIENTS).glob(f"*/{name}/final.safetensors")
        tensors, _ = read_arrays(file)
        for key, tensor in tensors.items():
            if not METHODS[method].roles[key.rpartition(".")[2]].restarts:
                own = model.p[key.rpartition(".")[2]]
                np.testing.assert_allclose(tensor.numpy().squeeze(), own.squeeze(), rtol=1e-9, atol=1e-12)


def test_methods_differ(tmp_path):
    """The comparison above could not tell methods apart if they all gave the same."""
    scores = {m: toy.go(config_for(tmp_path / m, m)).final["ann"]["score"] for m in METHODS}
    assert len({round(score, 9) for score in scores.values()}) == len(METHODS)


def shared_sent_back(config: FedConfig) -> tuple[Outcome, list[dict[str, np.ndarray]]]:
    """The arrays of every train reply, in the order they came."""
    seen = []

    def tap(message) -> None:
        if message.metadata.reply_to_message_id and message.metadata.message_type == "train":
            seen.append({key: array.numpy() for key, array in message.content["arrays"].items()})

    return toy.go(config, on_message=tap), seen


def test_ffa_mean_of_b_is_the_mean_of_the_updates(tmp_path):
    """One frozen A: mean_i(B_i) A = mean_i(B_i A). With FedIT, where A moves too, it is not."""
    gaps = {}
    for method in ("ffa-lora", "fedit"):
        config = config_for(tmp_path / method, method, rounds=1)
        outcome, replies = shared_sent_back(config)
        frozen = begun(method, rank=config.rank)["proj.A"].numpy()
        updates = [r["proj.B"] @ r.get("proj.A", frozen) for r in replies]
        mean = sum(w * u for w, u in zip(WEIGHTS, updates))
        product = outcome.arrays["proj.B"] @ outcome.arrays.get("proj.A", frozen)
        gaps[method] = np.abs(mean - product).max() / np.abs(mean).max()
    assert gaps["ffa-lora"] < 1e-14
    assert gaps["fedit"] > 1e-4


def test_unequal_ranks_mean_is_the_sum_of_the_weighted_products(tmp_path):
    """mean_i(B + B2_i B1_i) = B + sum_i w_i B2_i B1_i, with factors on the wire where they are smaller."""
    outcome, replies = shared_sent_back(config_for(tmp_path / "out", "fed-alora-het", rounds=1))
    forms = [sorted(key.removeprefix("proj.B") for key in reply) for reply in replies]
    assert forms == [[".left", ".right"], [""], [""]]  # rank 1: 1 (3 + 3) < 9 floats; rank 2: 12 > 9
    products = [r["proj.B"] if "proj.B" in r else r["proj.B.left"] @ r["proj.B.right"] for r in replies]
    np.testing.assert_allclose(outcome.arrays["proj.B"], sum(w * p for w, p in zip(WEIGHTS, products)), rtol=1e-13)


def test_a_step_of_unequal_ranks_equals_autograd_on_the_formula():
    torch.manual_seed(3)
    model = adapt(toy.Net(), share_spec("fed-alora-het"), rank=2, d_m=3, client="ann")
    own = {m.role: m.tensor for m in matrices(model, share_spec("fed-alora-het")).values()}
    with torch.no_grad():
        for tensor in own.values():
            tensor.copy_(torch.randn_like(tensor))
    x = torch.randn(5, toy.K, dtype=torch.float64)
    free = {role: tensor.detach().clone().requires_grad_() for role, tensor in own.items()}
    a, b = free["M"] @ free["A"], free["B"] + free["B2"] @ free["B1"]
    expected = x @ model.proj.base_layer.weight.T + 2.0 * (x @ a.T) @ b.T
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    for role in ("A", "M", "B1", "B2"):
        torch.testing.assert_close(own[role].grad, free[role].grad, rtol=1e-11, atol=1e-11)
    assert own["B"].grad is None


@pytest.mark.parametrize("method", METHODS)
def test_bytes_on_the_wire_are_the_formula(method, tmp_path):
    config = config_for(tmp_path / "out", method)
    outcome = toy.go(config)
    layers = layer_shapes(adapt(toy.Net(), config.spec, rank=2, d_m=3), config.spec)
    assert layers == [LayerShape(toy.K, toy.N)]
    for event in outcome.events:
        if event["event"] == "client" and event["kind"] == "train":
            up, down = config.spec.floats(layers, config.rank_of(event["client"]), config.d_m)
            assert (event["bytes_up"], event["bytes_down"]) == (8 * up, 8 * down)  # float64
    started = next(e for e in outcome.events if e["event"] == "run")
    assert ROUNDS * sum(started["bytes_up"].values()) == outcome.bytes_up
    assert ROUNDS * sum(started["bytes_down"].values()) == outcome.bytes_down


def test_formulas_give_the_papers_figures():
    """Llama-2-7B, q and v of 32 layers, up and down: FedIT 8.39 M floats, the halves 4.19 M; unequal ranks 7.87 M."""
    layers = [LayerShape(4096, 4096)] * 64
    both = {m: sum(METHODS[m].floats(layers, 8)) for m in ("fedit", "fedsa-lora", "fed-alora")}
    assert {m: round(n / 1e6, 2) for m, n in both.items()} == {"fedit": 8.39, "fedsa-lora": 4.19, "fed-alora": 4.19}
    ranks = (64, 64, 32, 32, 16, 16, 8, 8)
    floats = [sum(METHODS["fed-alora-het"].floats(layers, r, 16)) for r in ranks]
    assert round(sum(floats) / len(ranks) / 1e6, 2) == 7.87


@pytest.mark.parametrize("method", ["fed-alora", "fedsa-lora", "fed-alora-het"])
def test_private_parts_survive_rounds_unless_asked_otherwise(method, tmp_path):
    kept = toy.go(config_for(tmp_path / "kept", method, rounds=4))
    reset = toy.go(config_for(tmp_path / "reset", method, rounds=4, reset_private=True))
    assert {n: m["score"] for n, m in kept.final.items()} != {n: m["score"] for n, m in reset.final.items()}
    one = toy.go(config_for(tmp_path / "one", method, rounds=1))
    one_reset = toy.go(config_for(tmp_path / "one_reset", method, rounds=1, reset_private=True))
    assert all(np.array_equal(one.arrays[key], one_reset.arrays[key]) for key in one.arrays)  # nothing to forget yet


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].adapter != "het"])
def test_a_client_ends_with_an_adapter_that_peft_loads(method, tmp_path):
    from peft import PeftModel

    config = config_for(tmp_path / "out", method, rounds=2)
    outcome = toy.go(config)
    for name in toy.NAMES:
        [folder] = (tmp_path / "out" / CLIENTS).glob(f"*/{name}/adapter")
        model = PeftModel.from_pretrained(toy.Net(), str(folder))
        x, target = (torch.from_numpy(a) for a in toy.data_of(name))
        with torch.no_grad():
            assert -float(toy.loss_of(model, x, target)) == pytest.approx(outcome.final[name]["score"], rel=1e-6)


def test_who_draws_what():
    """A of FedIT is the same for all; A of Fed-ALoRA is each client's own; frozen A of FFA-LoRA is the same for all."""
    common = [(method, "proj.A", True) for method in ("fedit", "ffa-lora", "fedsa-lora")]
    own = [("fed-alora", "proj.A", False), *(("fed-alora-het", f"proj.{role}", False) for role in ("A", "M", "B1"))]
    for method, key, same in common + own:
        assert torch.equal(begun(method, client="ann")[key], begun(method, client="bob")[key]) is same
    assert not torch.equal(begun("fedit")["proj.A"], begun("fedit", seed=1)["proj.A"])


@pytest.mark.parametrize("method", METHODS)
def test_the_cost_in_words_is_the_formula(method):
    layer, r, d_m = LayerShape(11, 7), 3, 5
    words = METHODS[method].cost.replace(" (", " * (").replace("min * (", "min(").replace("2 r", "2 * r")
    words = words.replace("r K", "r * K").replace("r N", "r * N").replace("N d_m", "N * d_m")
    assert eval(words, {"K": layer.k, "N": layer.n, "r": r, "d_m": d_m, "min": min}) == sum(
        METHODS[method].floats([layer], r, d_m)
    )
