"""Participants from a configuration: real rows, honest metrics, frozen weights shared and nothing else."""

from __future__ import annotations

import pytest
import torch

from alora_kernels import data
from alora_kernels.federated import METHODS, ConfigError, FedConfig
from alora_kernels.federated.model import agreement, seeded
from alora_kernels.recipes import federated as fed_participants
from alora_kernels.recipes.federated import majority, participant, template
from alora_kernels.training import choice_accuracy

from ..support.toyrows import letters, write

MODELS = ("tiny-random-encoder", "tiny-random")
SMALL = dict(rank=2, train_size=40, test_size=24, max_length=48, local_steps=3, batch_size=4, learning_rate=1e-2)


@pytest.fixture
def toy(tmp_path):
    return letters(tmp_path / "toy.jsonl")


def config_of(*tasks, model="tiny-random-encoder", method="fed-alora", **changes):
    clients = [{"name": f"c{i}", "task": str(task) if task is not None else None} for i, task in enumerate(tasks)]
    return FedConfig(**(SMALL | dict(method=method, clients=clients, model=model, guard={"quorum": 1}) | changes))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_its_own_part_on_shared_weights(method, model, toy):
    config = config_of(toy, toy, method=method, model=model)
    one, two = (participant(config, name) for name in ("c0", "c1"))
    frozen = {n: p.clone() for n, p in one.model.named_parameters() if not p.requires_grad}
    trained = {n: p.clone() for n, p in one.model.named_parameters() if p.requires_grad}
    other = {n: p.clone() for n, p in two.model.named_parameters()}
    base = {p.data_ptr() for p in fed_participants._base_of(config).model.parameters()}
    own = {p.data_ptr() for p in one.model.parameters() if p.data_ptr() not in base}
    assert own.isdisjoint({p.data_ptr() for p in two.model.parameters()})
    encoder = {p.data_ptr() for n, p in one.model.named_parameters() if not p.requires_grad}
    assert len(base & encoder) > 10  # the big tensors are the very same
    one.train(one.model)
    parameters = dict(one.model.named_parameters())
    assert all(torch.equal(parameters[n], value) for n, value in frozen.items())
    assert all(torch.equal(p, other[n]) for n, p in two.model.named_parameters())
    assert any(not torch.equal(parameters[n], value) for n, value in trained.items())
    assert one.num_examples == 40
    assert one.base == two.base == template(config).base


def trained(config, seed):
    """Metrics of a fresh participant before and after a round."""
    client = participant(config, "c0")
    before = client.evaluate(client.model)
    with seeded(seed):
        client.train(client.model)
    return before, client.evaluate(client.model)


@pytest.mark.parametrize("model", MODELS)
def test_a_round_repeats_under_the_same_seed(model, toy):
    config = config_of(toy, model=model)
    assert trained(config, 5) == trained(config, 5)


def test_training_learns(toy):
    before, after = trained(config_of(toy, local_steps=40, batch_size=16, train_size=150), 0)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > 0.9  # two letters against two others; about half are right before


def test_encoder_metrics_by_hand(toy):
    client = participant(config_of(toy), "c0")
    head = client.model.get_submodule("base_model.model.head")
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 1.0]))  # labels sorted: cold, hot
    hot = list(data.load_task(str(toy), train_size=40, test_size=24)["test"]["answer"]).count("hot") / 24
    log_p = torch.log_softmax(torch.tensor([0.0, 1.0]), 0)
    loss = pytest.approx(float(-hot * log_p[1] - (1 - hot) * log_p[0]), rel=1e-5)
    assert client.evaluate(client.model) == {"accuracy": pytest.approx(hot), "loss": loss}


def test_causal_metrics_agree_with_the_trainers_judge(toy):
    client = participant(config_of(toy, model="tiny-random"), "c0")
    model, tokenizer = data.load_model("tiny-random")
    splits = data.load_task(str(toy), train_size=40, test_size=24)
    encoded = [dict(row) for row in data.encode(splits["test"], tokenizer, 48)]
    choices = data.first_tokens(("cold", "hot"), tokenizer)
    measured = client.evaluate(client.model)  # the adapter's B is zero
    judged = choice_accuracy(model, encoded, {"toy": list(choices.values())}, tasks=None, pad_token_id=0)
    assert measured["accuracy"] == judged["toy"]
    losses = []
    for prompt, answer in zip(splits["test"]["prompt"], splits["test"]["answer"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])).logits[0, -1]
        losses.append(-torch.log_softmax(logits, 0)[choices[answer]])
    assert measured["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_label_spaces_differ_under_private_heads(model, toy, tmp_path):
    rows = [{"prompt": f"number {i}", "answer": ("one", "two", "three")[i % 3]} for i in range(80)]
    config = config_of(toy, write(tmp_path / "three.jsonl", rows), model=model)
    models = [participant(config, name).model for name in ("c0", "c1")] + [template(config).model]
    specs = [agreement(m, config, "").digest for m in models]
    assert len(set(specs)) == 1


def test_unequal_ranks(toy):
    clients = [{"name": "small", "task": str(toy), "rank": 2}, {"name": "large", "task": str(toy), "rank": 5}]
    config = FedConfig(**(SMALL | dict(method="fed-alora-het", clients=clients, model="tiny-random-encoder", d_m=3)))
    for name, rank in (("small", 2), ("large", 5)):
        shapes = {p.shape for n, p in participant(config, name).model.named_parameters() if n.endswith("lora_M")}
        assert shapes == {(3, rank)}


def test_shared_heads_need_one_label_space(toy, monkeypatch):
    monkeypatch.setitem(data.TASKS, "toy", data.TASKS["movie"])  # positive, negative
    shared = config_of("toy", "toy", head="shared")
    arrays = agreement(template(shared).model, shared, "").arrays
    assert arrays["head.weight"] == ("float32", (2, 32))
    with pytest.raises(ConfigError, match=r"same label words.*c0: positive, negative; c1: .*head: private"):
        template(config_of("toy", "trec", head="shared"))
    with pytest.raises(ConfigError, match="before it sees data; name a built-in task"):
        template(config_of(toy, head="shared"))
    with pytest.raises(ConfigError, match="c1 answers with cold, hot and others with positive, negative"):
        participant(config_of("toy", toy, head="shared"), "c1")


def test_a_client_brings_its_own_file(toy, tmp_path):
    client = participant(config_of(None), "c0", data_file=toy)
    assert client.num_examples == 40
    with pytest.raises(ConfigError, match=r"clients\.c0: name a task \(trec, movie"):
        participant(config_of(None), "c0")
    with pytest.raises(ValueError, match=r"answers 'cold', 'hot', task 'movie' has positive, negative"):
        participant(config_of("movie"), "c0", data_file=toy)
    rows = [{"prompt": f"text {i}", "answer": "positive" if i % 3 else "negative"} for i in range(70)]
    own = participant(config_of("movie"), "c0", data_file=write(tmp_path / "own.jsonl", rows))
    assert own.num_examples == 40
    same = write(tmp_path / "same.jsonl", [row | {"answer": "yes"} for row in rows])
    with pytest.raises(ValueError, match="one answer only"):
        participant(config_of(None), "c0", data_file=same)
    turns = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "ab"[i % 2]}] for i in range(9)]
    chats = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in turns])
    with pytest.raises(ValueError, match="holds chats, and clients train on prompts"):
        participant(config_of(None), "c0", data_file=chats)


def test_bad_configurations_name_the_remedy(toy):
    with pytest.raises(ConfigError, match=r"no client 'x'; the configuration has c0"):
        participant(config_of(toy), "x")
    with pytest.raises(ConfigError, match=r"kind: 'some/model' does not tell; set `kind: encoder`"):
        template(config_of(toy, model="some/model"))
    with pytest.raises(ConfigError, match="metrics: f1 not measured here; known are accuracy, loss"):
        participant(config_of(toy, metrics=("accuracy", "f1")), "c0")
    assert set(participant(config_of(toy, metrics=("loss",)), "c0").evaluate(template(config_of(toy)).model)) == {
        "loss"
    }


def test_bases_and_rows_are_read_once(toy):
    config = config_of(toy, toy, seed=77)
    participant(config, "c0")
    models, rows = (f.cache_info().misses for f in (fed_participants._base, fed_participants.task_rows))
    participant(config, "c1")
    template(config)
    assert fed_participants._base.cache_info().misses == models
    assert fed_participants.task_rows.cache_info().misses == rows


def test_base_check_reads_the_weights(toy):
    names, values = (template(config_of(toy, base_check=check)).base for check in ("names", "data"))
    assert names != values
    assert participant(config_of(toy, base_check="data"), "c0").base == values


def test_majority_is_the_baseline_of_the_data(toy):
    expected = data.majority_baseline(data.load_task(str(toy), train_size=40, test_size=24))
    assert majority(config_of(toy)) == {"c0": expected["toy"]}


def test_long_rows_are_cut(toy, tmp_path):
    rows = [{"prompt": "abc" * 50 + str(i), "answer": "hot" if i % 2 else "cold"} for i in range(80)]
    file = write(tmp_path / "long.jsonl", rows)
    for model in MODELS:
        client = participant(config_of(file, model=model, max_length=16), "c0")
        assert max(map(len, client.train.keywords["rows"].train)) <= 16
        assert client.evaluate(client.model)["loss"] > 0


def test_collate_pads_on_the_side_it_is_told():
    rows, cpu = [[1, 2, 3], [4]], torch.device("cpu")
    right, left = (fed_participants.collate(rows, 9, left=side, device=cpu) for side in (False, True))
    assert right["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "position_ids" not in right
    assert left["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert left["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
