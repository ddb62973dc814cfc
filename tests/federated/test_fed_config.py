"""The configuration: what it accepts, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from alora_kernels.federated import METHODS, ConfigError, FedConfig, load_config

SMALL = "method: fed-alora\nclients: [ann, bob]\n"


def parse(text: str) -> FedConfig:
    return FedConfig.from_yaml(text)


def test_two_lines_are_enough():
    config = parse(SMALL)
    assert [c.name for c in config.clients] == ["ann", "bob"]
    assert (config.scaling, config.strategy.name, config.guard.quorum, config.dp) == (2.0, "fedavg", 2, None)


def test_clients_as_names_mapping_or_list_are_the_same():
    listed = parse("method: fedit\nclients: [{name: ann, task: movie}, {name: bob, task: nyt}]")
    mapped = parse("method: fedit\nclients: {ann: {task: movie}, bob: {task: nyt}}")
    assert listed == mapped


METHOD = "clients: [ann, bob]\nguard: {quorum: 1, norm_cap: 3}\noutput: /tmp/x\nmethod: "
DP = SMALL + "dp: {noise_multiplier: 1, clipping_norm: 0.5}\nweights: equal"


@pytest.mark.parametrize("text", [*(METHOD + method for method in METHODS), DP])
def test_yaml_round_trip(text):
    config = parse(text)
    assert parse(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method: [", "is not valid YAML"),
        ("- a", "must hold a mapping"),
        ("clients: [ann]", "method: must be given"),
        ("method: fedavg\nclients: [ann, bob]", "unknown federated method 'fedavg'; known are fedit, ffa-lora"),
        (SMALL + "rond: 3", "rond: unknown setting; did you mean rounds?"),
        (SMALL + "rounds: 0", "rounds: must be >= 1, got 0"),
        (SMALL + "nothing_like_it: 3", "nothing_like_it: unknown setting; known are method, clients"),
        (SMALL + "rounds: 3\nrounds: 4", "is not valid YAML: 'rounds' is given twice in one mapping at line 4"),
        (SMALL + "rounds: many", "rounds: must be a whole number"),
        (SMALL + "rank: 2.5", "rank: must be a whole number"),
        (SMALL + "learning_rate: .nan", "learning_rate"),
        (SMALL + "head: mine", "head: must be 'private' or 'shared', got 'mine'"),
        (SMALL + "guard: {quorum: 0}", "quorum must be an integer >= 1"),
        (SMALL + "guard: {quorum: 3}", "guard.quorum: 3 of 2 clients can never be reached"),
        (SMALL + "guard: {qorum: 1}", "guard.qorum: unknown setting; did you mean quorum?"),
        (SMALL + "strategy: {nam: fedavg}", "strategy.nam: unknown setting"),
        (SMALL + "dp: {noise_multiplier: -1, clipping_norm: 1}", "noise_multiplier must be >= 0"),
        (SMALL + "dp: {noise_multiplier: 1, clipping_norm: 1}", "weights: the privacy accountant needs"),
        (DP.replace("fed-alora", "local"), "dp: with local nothing travels that could be protected"),
        (SMALL + "secagg: true", "secure aggregation is not offered"),
        ("method: fedit\nclients: [ann, ann]", "clients: names must differ"),
        ("method: fedit\nclients: []", "clients"),
        ("method: fedit\nclients: ['../etc']", "clients[0].name"),
        ("method: fedit\nclients: {ann: {rank: 4}, bob: }", "for unequal ranks use fed-alora-het"),
        ("method: fed-alora-het\nclients: [ann, bob]\nlora_alpha: 8", "alpha = 2 r for every client"),
    ],
)
def test_mistakes_are_named(text, says):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert says in str(error.value)


def test_all_mistakes_at_once():
    with pytest.raises(ConfigError) as error:
        parse(SMALL + "rounds: 0\nrank: 0\nrond: 1")
    assert len(str(error.value).splitlines()) == 4  # the file, and a line for each


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*none.yaml"):
        load_config(tmp_path / "none.yaml")


def test_the_example_is_valid():
    config = load_config(Path(__file__).parents[2] / "examples" / "federated.yaml")
    assert (config.method, len(config.clients)) == ("fed-alora", 4)
