"""Tasks that come and go in saved adapters: against float64 weights, and through stock LoRA folders and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from alora_kernels import files
from alora_kernels.adapters.cards import TaskCard, read_task_cards, write_task_cards
from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.export import export_lora
from alora_kernels.adapters.import_lora import import_lora
from alora_kernels.adapters.reader import read_adapter
from alora_kernels.adapters.tasks import arrange_tasks, join_adapters, list_tasks
from alora_kernels.modules.adapter import delta_weight

from ..support.adapters import MLP, Mlp, alora_folder, change_config, change_weights, lora_folder

Deltas = dict[str, dict[str, torch.Tensor]]
MOVIE = TaskCard(template="Review: {text}\nSentiment:", answers=("good", "bad"))
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))


def folder(path: Path, tasks: list[str] | None = None, **settings: Any) -> Path:
    """An adapter of the small model whose tasks all do something."""
    return alora_folder(path, Mlp(), tasks or ["movie", "trec", "law"], **({"base_name": "tiny"} | MLP | settings))


def same(path: Path) -> dict[str, str | None]:
    """Its tasks as they are."""
    return {task: task for task in read_adapter(path).tasks}


def deltas(path: Path) -> Deltas:
    """Task -> module -> its change of the weight in float64."""
    file = read_adapter(path)
    return {
        task: {m: delta_weight(a, file.b[m], file.scaling[m], torch.float64) for m, a in file.matrices(task).items()}
        for task in file.tasks
    }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerances: float) -> None:
    """The same changes; a module that only one has is not changed by it."""
    for name in one.keys() | other.keys():
        there = one.get(name, torch.zeros(()).double()), other.get(name, torch.zeros(()).double())
        torch.testing.assert_close(*torch.broadcast_tensors(*there), **({"rtol": 0, "atol": 0} | tolerances))


def outputs(path: Path, task: str) -> torch.Tensor:
    """What the adapted model says with a task of a folder."""
    model = PeftModel.from_pretrained(Mlp(), path).eval()
    names = [task] * len(X) if "tasks" in json.loads((path / "adapter_config.json").read_text()) else None
    with torch.no_grad():
        return model(X, adapter_names=names) if names else model(X)


def check_round_trip(path: Path, tmp_path: Path) -> None:
    """Each task as a stock LoRA in stock PEFT answers the same, and all come back as one adapter."""
    export_lora(path, tmp_path / "stock", overwrite=True)
    for task in read_adapter(path).tasks:
        torch.testing.assert_close(outputs(path, task), outputs(tmp_path / "stock" / task, task))
    names = read_adapter(path).tasks
    import_lora([tmp_path / "stock" / name for name in names], tmp_path / "back", overwrite=True)
    for task, changes in deltas(path).items():
        assert_equal(deltas(tmp_path / "back")[task], changes, rtol=1e-5, atol=1e-6)


def test_list_says_what_the_dense_weights_say(tmp_path):
    path = folder(tmp_path / "one", rank_pattern={"up": 2})
    write_task_cards(path, {"movie": MOVIE})
    dense = {task: torch.cat([d.flatten() for d in one.values()]) for task, one in deltas(path).items()}
    found = list_tasks(path)
    assert [t.name for t in found] == list(dense)
    assert [t.card for t in found] == [MOVIE, None, None]
    for task in found:
        assert task.norm == pytest.approx(float(dense[task.name].norm()))
        for other, cosine in task.alike.items():
            assert cosine == pytest.approx(float(torch.cosine_similarity(dense[task.name], dense[other], 0)))
        assert task.alike.keys() == dense.keys() - {task.name}


def test_list_of_an_adapter_that_was_never_trained(tmp_path):
    path = folder(tmp_path / "one", ["movie"])
    assert [t.alike for t in list_tasks(path)] == [{}]
    change_weights(path, lambda tensors: [t.zero_() for name, t in tensors.items() if "_B" in name])
    arrange_tasks(path, {"movie": "movie", "law": None}, overwrite=True)
    assert [(t.norm, list(t.alike.values())) for t in list_tasks(path)] == [(0.0, [0.0])] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_remove_and_rename_leave_the_others_to_the_bit(tmp_path, dtype):
    path, before = folder(tmp_path / "one", dtype=dtype), deltas(tmp_path / "one")
    write_task_cards(path, {"movie": MOVIE, "trec": TaskCard(template="Q: {text}")})
    card = {"spam": TaskCard(template="Mail: {text}")}
    four = arrange_tasks(path, same(path) | {"spam": None}, cards=card, out=tmp_path / "four")
    assert read_adapter(path).tasks == ("movie", "trec", "law")
    assert read_adapter(four).tasks == ("movie", "trec", "law", "spam") and read_adapter(four).dtype == dtype
    named = arrange_tasks(four, {"film": "movie", "law": "law", "spam": "spam"}, out=tmp_path / "named")
    assert read_adapter(named).tasks == ("film", "law", "spam")
    assert read_task_cards(named, ("film", "law", "spam")).keys() == {"film", "spam"}
    assert read_task_cards(named, ("film",))["film"] == MOVIE
    assert_equal(deltas(named)["film"], before["movie"])
    assert_equal(deltas(named)["law"], before["law"])
    assert_equal(deltas(named)["spam"], deltas(four)["spam"])
    if dtype == torch.float32:
        check_round_trip(named, tmp_path)


def test_a_new_task_begins_as_a_layer_does_or_like_another(tmp_path):
    path = folder(tmp_path / "one")
    write_task_cards(path, {"trec": MOVIE})
    new = {"seeded": None, "other": None, "copied": "trec"}
    made = read_adapter(arrange_tasks(path, same(path) | new, out=tmp_path / "six"))
    again = read_adapter(arrange_tasks(path, {"seeded": None}, seed=1, out=tmp_path / "again"))
    assert read_task_cards(made.folder, made.tasks).keys() == {"trec"}
    for name, a in made.matrices("seeded").items():
        bound = a.shape[1] ** -0.5
        assert 0.5 * bound < float(a.abs().max()) <= bound
        assert not torch.equal(a, made.matrices("other")[name]) and not torch.equal(a, again.matrices("seeded")[name])
        assert torch.equal(made.matrices("copied")[name], read_adapter(path).matrices("trec")[name])


def test_names_can_be_swapped_and_take_their_cards_along(tmp_path):
    path = folder(tmp_path / "one")
    write_task_cards(path, {"movie": MOVIE})
    before, after = deltas(path), arrange_tasks(path, {"trec": "movie", "movie": "trec"}, out=tmp_path / "swapped")
    assert_equal(deltas(after)["trec"], before["movie"])
    assert_equal(deltas(after)["movie"], before["trec"])
    assert read_task_cards(after, ("trec", "movie")) == {"trec": MOVIE}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({}, {"r": 2, "lora_alpha": 3}),
        ({"use_rslora": True}, {"r": 8}),
        ({"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 5}}, {"r": 6}),
        ({"target_modules": ["up"]}, {"target_modules": ["down"]}),
        ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "lora_alpha": 5}),
    ],
)
def test_join_by_stacking_is_exact(tmp_path, first, second):
    one = folder(tmp_path / "one", ["movie", "trec"], **first)
    other = folder(tmp_path / "other", ["law", "spam"], seed=5, **second)
    write_task_cards(one, {"movie": MOVIE})
    write_task_cards(other, {"law": TaskCard(template="Law: {text}")})
    report = join_adapters(one, other, prefix="x-", out=tmp_path / "both")
    got, wanted = deltas(tmp_path / "both"), deltas(one) | {f"x-{t}": d for t, d in deltas(other).items()}
    assert list(got) == list(wanted) == list(report.tasks) == ["movie", "trec", "x-law", "x-spam"]
    for task, changes in wanted.items():
        assert_equal(got[task], changes, rtol=1e-6, atol=1e-7)
    assert report.error == report.task_error("movie") == 0 and read_adapter(tmp_path / "both").rank == report.rank
    assert read_task_cards(tmp_path / "both", tuple(got)).keys() == {"movie", "x-law"}
    check_round_trip(tmp_path / "both", tmp_path)


def test_join_of_one_scaling_keeps_every_number(tmp_path):
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", ["spam"], seed=5)
    join_adapters(one, other, out=tmp_path / "both")
    both, first, second = (read_adapter(tmp_path / name) for name in ("both", "one", "other"))
    assert both.scaling == first.scaling
    for name, b in both.b.items():
        assert torch.equal(b, torch.cat([first.b[name], second.b[name]], 1))
        assert torch.equal(both.matrices("law")[name][:4], first.matrices("law")[name])
        assert torch.equal(both.matrices("spam")[name][4:], second.matrices("spam")[name])
        assert not both.matrices("law")[name][4:].any() and not both.matrices("spam")[name][:4].any()


def test_join_at_a_rank_is_the_best_shared_b_and_says_what_it_loses(tmp_path):
    one, other = folder(tmp_path / "one", ["movie", "trec"]), folder(tmp_path / "other", ["spam"], seed=5)
    report = join_adapters(one, other, rank=3, out=tmp_path / "both")
    wanted = deltas(one) | deltas(other)
    for name in ("up", "down"):
        u, _, _ = torch.linalg.svd(torch.cat([d[name] for d in wanted.values()], 1), full_matrices=False)
        for task, changes in deltas(tmp_path / "both").items():
            best = u[:, :3] @ (u[:, :3].T @ wanted[task][name])
            torch.testing.assert_close(changes[name], best, rtol=1e-5, atol=1e-6)
    for task, changes in deltas(tmp_path / "both").items():
        lost = sum(float((changes[m] - d).square().sum()) for m, d in wanted[task].items())
        whole = sum(float(d.square().sum()) for d in wanted[task].values())
        assert 0 < report.task_error(task) == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert join_adapters(one, other, rank=8, out=tmp_path / "both", overwrite=True).error < 1e-9
    check_round_trip(tmp_path / "both", tmp_path)


def test_a_stock_lora_joins_as_one_task(tmp_path):
    one = folder(tmp_path / "one")
    stock = lora_folder(tmp_path / "poems", Mlp(), base_name="tiny", use_rslora=True, **MLP)
    join_adapters(one, stock, out=tmp_path / "both")
    assert_equal(deltas(tmp_path / "both")["poems"], deltas(stock)["poems"], rtol=1e-6, atol=1e-7)
    check_round_trip(tmp_path / "both", tmp_path)


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    path = folder(tmp_path / "one", ["movie", "law"])
    write_task_cards(path, {"movie": TaskCard("Review: {text}\nMood:")})
    (path / "recipe.yaml").write_text("tasks: [movie, law]  # mine")
    (path / "losses.json").write_text("[]")
    settings = {"name": "alora", "tasks": ["movie", "law"], "r": 4, "lora_alpha": 8.0}
    (path / "method.json").write_text(json.dumps({"settings": settings, "record": {"budget": "rank"}}))
    out = arrange_tasks(path, {"film": "movie"}, out=tmp_path / "b")
    assert (out / "recipe.yaml").read_text() == "tasks: [movie, law]  # mine"
    assert (out / "losses.json").read_text() == "[]"
    assert '- `film`: `"Review: {text}\\nMood:"`' in (out / "README.md").read_text()  # on one line
    method = json.loads((out / "method.json").read_text())
    assert method == {"settings": settings | {"tasks": ["film"], "use_rslora": False}, "record": {"budget": "rank"}}
    join_adapters(out, path, out=tmp_path / "c")
    assert json.loads((tmp_path / "c" / "method.json").read_text())["settings"]["r"] == 8


def test_in_place_after_a_yes_and_nothing_is_lost(tmp_path, monkeypatch):
    path, two = folder(tmp_path / "one"), {"movie": "movie", "trec": "trec"}
    write_task_cards(path, {"law": MOVIE})
    with pytest.raises(ValueError, match=r"holds an adapter: say overwrite \(--overwrite\)"):
        arrange_tasks(path, two)
    before, replace = {file.name: file.read_bytes() for file in path.iterdir()}, files.os.replace

    def killed_at_the_config(source: Any, target: Any) -> None:
        if Path(target) == path / "adapter_config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", killed_at_the_config)
    with pytest.raises(KeyboardInterrupt):
        arrange_tasks(path, two, overwrite=True)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in (path / ".before").iterdir()} == before
    with pytest.raises(AdapterFolderError):
        arrange_tasks(path, two, overwrite=True)  # weights and config do not belong together
    for file in (path / ".before").iterdir():
        file.rename(path / file.name)
    assert deltas(path).keys() == {"movie", "trec", "law"}
    with pytest.raises(ValueError, match="before a change that did not end"):
        arrange_tasks(path, two, overwrite=True)
    (path / ".before").rmdir()
    arrange_tasks(path, two, overwrite=True)
    assert read_adapter(path).tasks == ("movie", "trec")
    assert not (path / "adapter_tasks.json").exists() and not (path / ".before").exists()


def test_refusals_name_the_remedy(tmp_path):
    path, out = folder(tmp_path / "one"), tmp_path / "out"
    for call, message in (
        (lambda: arrange_tasks(path, {"x": "movi"}, out=out), r"has no task 'movi': did you mean movie\?"),
        (lambda: arrange_tasks(path, {}, out=out), "at least one task"),
        (lambda: arrange_tasks(path, {"__base__": None}, out=out), "reserved for the base"),
        (
            lambda: arrange_tasks(path, {"x": None}, cards={"x": TaskCard(template="a {b")}, out=out),
            "braces that do not match",
        ),
        (lambda: join_adapters(path, path, out=out), r"both adapters have a task 'movie', 'trec', 'law': .*--prefix"),
        (lambda: join_adapters(path, path, prefix="x", rank=0, out=out), "rank must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not out.exists()


def test_what_cannot_be_joined_is_refused_by_name(tmp_path):
    path, out = folder(tmp_path / "one"), tmp_path / "out"
    elsewhere = folder(tmp_path / "b", ["b"], base_name="another")
    with pytest.raises(ValueError, match="different base models: law on tiny, b on another"):
        join_adapters(path, elsewhere, out=out)
    change_config(elsewhere, base_model_name_or_path="tiny", revision="v2")
    change_config(path, revision="v1")
    with pytest.raises(ValueError, match="different revisions of the base: law on v1, b on v2"):
        join_adapters(path, elsewhere, out=out)
    hydra = tmp_path / "hydra"
    hydra.mkdir()
    (hydra / "method.json").write_text(json.dumps({"settings": {"name": "hydralora", "tasks": ["a"]}}))
    for call in (lambda: join_adapters(path, hydra, out=out), lambda: list_tasks(hydra)):
        with pytest.raises(AdapterFolderError, match="is of the method HydraLoRA"):
            call()
    change_config(elsewhere, routing="soft", tasks=None, num_experts=1)
    with pytest.raises(AdapterFolderError, match="weighs its experts"):
        join_adapters(path, elsewhere, out=out)
    with pytest.raises(AdapterFolderError, match="is a stock LoRA"):
        list_tasks(lora_folder(tmp_path / "lora", Mlp(), **MLP))
    (path.parent / "optimizer.pt").write_bytes(b"")
    with pytest.raises(AdapterFolderError, match="is a checkpoint"):
        arrange_tasks(path, {"law": "law"}, overwrite=True)
    assert not out.exists()
