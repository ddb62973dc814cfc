"""Four clients with different texts learn together, method by method: `python examples/federated_sentiment.py`.

Three methods on MiniLM take a few minutes on two cores; runs stay in the output folder and are read back the next time.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alora_kernels.federated import METHODS, FedConfig
from alora_kernels.recipes import study as fed_study
from alora_kernels.recipes.display import console

FOUR = ("movie", "amazon", "nyt", "tweets")
EIGHT = (*FOUR, "trec", "spam", "bbc", "words")
DEFAULT = ("local", "fedit", "fed-alora")
ENCODER = {"rounds": 6, "local_steps": 6, "batch_size": 16, "learning_rate": 2e-3, "test_size": 100}
CAUSAL = {"rounds": 3, "local_steps": 4, "batch_size": 8, "learning_rate": 1e-3, "test_size": 48}  # slower
# VeRA trains two vectors per layer: more entries and larger steps
OWN: dict[str, Any] = {"fedsa-vera": {"rank": 256, "learning_rate": 2e-2}}
RANKS = (16, 8, 8, 4)  # of the clients, in turn, where a method lets them differ


def main(
    domains: str = "four",
    methods: Sequence[str] = DEFAULT,
    seeds: Sequence[int] = (0,),
    model: str = "minilm",
    output: str = "runs/fed-sentiment",
    **settings: int,
) -> list[fed_study.Result]:
    """Run every method with every seed, print the table, save JSON and picture."""
    size: dict[str, Any] = (CAUSAL if model.startswith("smollm2") else ENCODER) | settings
    chosen = EIGHT if domains == "eight" else FOUR
    folder = Path(output) / model.replace("/", "-") / domains
    configs = []
    for seed, method in itertools.product(seeds, METHODS if "all" in methods else methods):
        ranks = [{"rank": r} for r in RANKS] if METHODS[method].adapter == "het" else [{}]
        clients = [{"name": name, "task": name, **ranks[i % len(ranks)]} for i, name in enumerate(chosen)]
        values = {"method": method, "clients": clients, "model": model, "seed": seed} | OWN.get(method, {}) | size
        configs.append(FedConfig(**values, output=folder / method / f"seed-{seed}"))
    results = fed_study.study(configs)
    console.print(fed_study.table(results, f"{model}, {domains} clients, seeds {[*seeds]}"))
    console.print("saved " + " and ".join(map(str, fed_study.save(results, configs, folder))))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--domains", choices=("four", "eight"), help="eight: question types, spam, news, words too")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "all"), help="default: " + ", ".join(DEFAULT))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--model", help="minilm (default), smollm2-135m, a folder or a hub id")
    parser.add_argument("--output")
    for name in ("rounds", "local_steps", "batch_size", "train_size", "test_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    main(**vars(parser.parse_args()))
