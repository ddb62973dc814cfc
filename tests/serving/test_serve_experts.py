"""Serving with adapters on the experts of a mixture: every request answers as its task merged into the base would."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from truth import alone, merged_models

from alora_kernels import route
from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.reader import read_adapter
from alora_kernels.serving import Engine, EngineConfig, Sampling, TaskStore
from alora_kernels.serving.request import AdapterRefusedError
from alora_kernels.serving.slots import Slots
from alora_kernels.tuner import ALoRALayer
from tests.support.adapters import alora_folder, change_config, change_weights, tiny_base
from tests.support.mixtures import FAMILIES, VOCAB, mixture

TASKS = ("red", "green", "blue")
SHARING = [("shared", "each"), ("each", "each"), ("shared", "shared"), ("each", "shared")]
CONFIG = EngineConfig(max_batch=8, max_waiting=64, max_context=64, cache_tokens=512, batch_tokens=48, page_size=16)
GREEDY = Sampling(max_tokens=6, temperature=0)
ATTENTION = ["q_proj", "v_proj"]


def folder(path: Path, base: Any, tasks: Any = TASKS, **settings: Any) -> Path:
    """Adapters on experts and attention, all with one B."""
    given = {"target_modules": ATTENTION, "target_parameters": "all-experts", "base_name": "tiny", "seed_b": 0}
    return alora_folder(path, base, tasks, **(given | settings))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (3 + 2 * (i % 5),), generator=generator).tolist() for i in range(count)]


def started(base: Any, store: TaskStore) -> Engine:
    return Engine(base, tiny_base()[1], store, CONFIG).start()


def assert_as_merged(engine: Engine, models: dict[str | None, Any], count: int = 12) -> None:
    """A mixed batch of all these tasks, the base among them."""
    ids = prompts(count)
    names = [list(models)[i % len(models)] for i in range(count)]
    done = engine.generate(ids, names, GREEDY)
    assert [c.token_ids for c in done] == [alone(models[n], p, 6) for n, p in zip(names, ids, strict=True)]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "GptOss"])  # whose attention needs a GPU
@pytest.mark.parametrize("choice", SHARING)
def test_a_mixed_batch_equals_each_request_alone_with_its_task_merged(tmp_path, family, choice):
    base = mixture(family, eos_token_id=2)  # the engine's tokenizer's
    path = folder(tmp_path / "one", base, experts_A=choice[0], experts_B=choice[1])
    models = merged_models(path, TASKS, base)
    resident = 2 if choice == ("each", "each") else 4
    with TaskStore.open(base, [path], resident=resident) as store:  # 2: three tasks take turns
        engine = started(base, store)
        try:
            assert_as_merged(engine, models)
        finally:
            engine.stop()
    ids = prompts(1)[0]
    assert len({alone(model, ids, 6) for model in models.values()}) > 2  # the tasks do differ


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", SHARING)
def test_rows_of_slots_and_of_the_base(tmp_path, family, choice):
    base = mixture(family)
    path = folder(tmp_path / "one", base, experts_A=choice[0], experts_B=choice[1])
    models, file = merged_models(path, TASKS, base), read_adapter(path)
    slots, ids = Slots(base, file, 3), torch.tensor(prompts(10)[::5]).repeat(2, 1)
    for slot, task in ((2, "red"), (0, "blue"), (1, "red"), (1, "green")):
        slots.write(slot, slots.rows(file, task))
    with torch.no_grad(), route(torch.tensor([1, -1, 2, 0])):
        found = base(input_ids=ids).logits
    for row, ids_of, task in zip(found, ids, ("green", None, "red", "blue"), strict=True):
        wanted = models[task](input_ids=ids_of[None]).logits[0]
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("choice", SHARING)
def test_folders_come_go_and_are_replaced(tmp_path, choice):
    base = mixture(eos_token_id=2)
    settings = {"experts_A": choice[0], "experts_B": choice[1]}
    first = folder(tmp_path / "one", base, **settings)
    second = folder(tmp_path / "two", base, ["red", "grey"], seed=9, **settings)
    models = merged_models(first, TASKS, base)
    others = merged_models(second, ["red", "grey"], base)
    with TaskStore.open(base, [first], resident=3, host=1, spill=tmp_path / "spill") as store:
        engine = started(base, store)
        try:
            assert_as_merged(engine, models)
            store.load(second, name="grey", task="grey")
            assert_as_merged(engine, models | {"grey": others["grey"]}, 15)
            store.load(second, name="red", task="red", replace=True)
            assert_as_merged(engine, models | others, 15)
            store.unload("green")
            rest = {name: model for name, model in (models | others).items() if name != "green"}
            assert_as_merged(engine, rest)
        finally:
            engine.stop()


def test_a_smaller_rank_of_experts_shares_the_first_columns(tmp_path):
    base = mixture(eos_token_id=2)
    path = folder(tmp_path / "one", base, experts_A="each")
    small = folder(tmp_path / "two", base, ["grey"], seed=9, experts_A="each")

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor[..., :2, :] if "_A" in name else tensor[..., :2]).contiguous()

    change_weights(small, cut)
    change_config(small, r=2, lora_alpha=4)
    models = merged_models(path, TASKS, base) | merged_models(small, ["grey"], base)
    with TaskStore.open(base, [path, small], resident=2) as store:
        engine = started(base, store)
        try:
            assert_as_merged(engine, models, 15)
        finally:
            engine.stop()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"experts_A": "each"}, "share A and B otherwise than those of the store"),
        ({"experts_B": "shared"}, "share A and B otherwise than those of the store"),
        ({"target_parameters": ["experts.down_proj"]}, "does not adapt the modules of the store: missing"),
        ({"seed_b": 3}, "its B differs from the B that all tasks share"),
    ],
)
def test_other_folders_are_refused(tmp_path, settings, why):
    base = mixture()
    path, other = folder(tmp_path / "one", base), folder(tmp_path / "two", base, ["grey"], **settings)
    with TaskStore.open(base, [path]) as store:
        with pytest.raises(AdapterRefusedError, match=why):
            store.load(other)
        assert store.names() == list(TASKS)


def test_what_does_not_fit_the_base_is_refused_and_leaves_it_alone(tmp_path):
    path = folder(tmp_path / "one", mixture(), experts_A="each")
    for base, why in (
        (mixture(num_experts=5), "is not of the shape that the base has there"),
        (mixture(moe_intermediate_size=16), "is not of the shape that the base has there"),
        (tiny_base()[0], "of the model is called so"),
    ):
        before = [*base.named_modules()]
        with pytest.raises(AdapterFolderError, match=f"^{re.escape(str(path))}: .*{why}"):
            Slots(base, read_adapter(path), 2)
        assert [*base.named_modules()] == before


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_remove_gives_the_base_back(tmp_path, family):
    base = mixture(family)
    ids, plain = torch.tensor(prompts(1)), deepcopy(base)
    trained = {name: p.requires_grad for name, p in base.named_parameters()}
    for settings in ({}, {"target_modules": None}):
        slots = Slots(base, read_adapter(folder(tmp_path / f"{len(settings)}", mixture(family), **settings)), 2)
        assert any(isinstance(m, ALoRALayer) for m in base.modules())
        slots.remove()
        assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
        assert {name: p.requires_grad for name, p in base.named_parameters()} == trained
        assert torch.equal(base(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_bytes_of_a_task_are_those_of_its_numbers(tmp_path):
    for i, choice in enumerate(SHARING):
        path = folder(tmp_path / str(i), mixture(), experts_A=choice[0], experts_B=choice[1])
        slots, file = Slots(mixture(), read_adapter(path), 2), read_adapter(path)
        assert slots.bytes_per_task == sum(a.nbytes for a in file.matrices("red").values())
        assert slots.bytes_shared == sum(b.nbytes for b in file.b.values())
