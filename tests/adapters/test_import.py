"""Stock LoRAs to one ALoRA: the best shared B against a dense decomposition, exact returns, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from alora_kernels.adapters import writer
from alora_kernels.adapters.export import export_lora
from alora_kernels.adapters.import_lora import import_lora, rank_for, shared_b
from alora_kernels.adapters.reader import Factors, Shape, read_adapter

from ..support.adapters import CONFIG, MLP, WEIGHTS, change_config, half_written, lora_folder
from ..support.tiny import Mlp, adapted, bert, gpt2, llama, logits, tokens

UP = "base_model.model.up.lora_{}.weight"


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def lora(path: Path, base: Any = None, seed: int = 0, **settings: Any) -> Path:
    """A saved stock LoRA with its own random matrices, which does not say what its base is."""
    given = MLP | settings if base is None else settings
    return lora_folder(path, Mlp() if base is None else base, seed=seed, base_name=None, **given)


def random_factors(ranks: list[int | None], k: int, n: int) -> list[Factors | None]:
    return [None if r is None else Factors(torch.randn(r, k), torch.randn(n, r), 0.5 + i) for i, r in enumerate(ranks)]


def delta(found: Factors | None, shape: Shape) -> torch.Tensor:
    if found is None:
        return torch.zeros(shape.n, shape.k, dtype=torch.float64)
    return found.s * found.b.double() @ found.a.double()


@pytest.mark.parametrize("ranks", [[3], [2, 3, 4], [4, None, 4], [9, 9, 9, 9]])
@pytest.mark.parametrize("size", [(12, 10), (6, 20), (20, 6)])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_the_best_b_as_by_the_dense_decomposition(ranks, size, rank):
    k, n = size
    shape = Shape(n, rank, k)
    factors = random_factors(ranks, k, n)
    got = shared_b(factors, shape)
    dense = [delta(found, shape) for found in factors]
    u, sigma, _ = torch.linalg.svd(torch.cat(dense, 1), full_matrices=False)
    basis = u[:, :rank]
    assert (got.b.shape, got.a.shape) == ((shape.n, rank), (len(ranks), rank, shape.k))
    for i, d in enumerate(dense):
        best = basis @ (basis.T @ d)
        assert torch.allclose(got.b @ got.a[i], best, atol=1e-10)
        assert got.norms[i] == pytest.approx(float(d.norm()))
        assert got.lost[i] == pytest.approx(float((d - got.b @ got.a[i]).norm()), abs=1e-10)
    assert sum(x * x for x in got.lost) == pytest.approx(float(sigma[rank:].square().sum()), abs=1e-9)
    length = min(len(sigma), len(got.sigma))
    assert torch.allclose(got.sigma[:length], sigma[:length], atol=1e-10)
    present = float(got.a.square().sum() / len(ranks)) ** 0.5
    assert float(got.b.norm()) == pytest.approx(present)  # A and B of one scale


def test_no_other_b_is_better():
    factors, shape = random_factors([3, 3, 3], 10, 12), Shape(12, 4, 10)
    wide = torch.cat([delta(found, shape) for found in factors], 1)
    lost = sum(x * x for x in shared_b(factors, shape).lost)
    for seed in range(20):
        noise = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for b in (noise, shared_b(factors, shape).b + 0.05 * noise):
            q = torch.linalg.qr(b).Q
            assert float((wide - q @ (q.T @ wide)).square().sum()) > lost


def test_a_module_nobody_changes():
    zero = Factors(torch.randn(2, 5), torch.zeros(4, 2), 1.0)
    got = shared_b([zero, None], Shape(4, 2, 5))
    assert torch.isfinite(got.b).all()
    assert not (got.b @ got.a).any()
    assert got.lost == [0.0, 0.0]


def test_rank_for_a_goal():
    spectra = [torch.tensor([3.0, 4.0, 0.0]).double(), torch.tensor([5.0]).double()]
    # squares left after R = 0, 1, 2: 50, 16, 0
    assert rank_for(1.0, spectra) == 1
    assert rank_for((16 / 50) ** 0.5 + 1e-9, spectra) == 1
    assert rank_for((16 / 50) ** 0.5 - 1e-9, spectra) == 2
    assert rank_for(0.01, spectra) == 2


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}, "r": 3},
                                      {"use_rslora": True}])  # fmt: skip
@pytest.mark.parametrize("base", [llama, gpt2])
def test_exported_adapters_come_back(tmp_path, settings, base):
    ours = adapted(base(), **settings)
    export_lora(ours, tmp_path)
    report = import_lora([tmp_path / "math", tmp_path / "code"], tmp_path / "back")
    assert report.rank == max(ours.peft_config["default"].r, 2)
    assert report.error < 1e-6
    back = PeftModel.from_pretrained(base().double(), tmp_path / "back")
    names = {"adapter_names": ["math", "code"]}
    assert relative(logits(back, tokens(), **names), logits(ours.double(), tokens(), **names)) < 1e-5
    config = PeftConfig.from_pretrained(tmp_path / "back")
    assert (config.tasks, config.r, config.lora_alpha) == (["math", "code"], report.rank, report.rank)
    assert config.target_modules == ours.peft_config["default"].target_modules
    assert (config.task_type, config.settings_at("up")) == ("CAUSAL_LM", (report.rank, 1.0))


def test_loras_trained_apart_are_exact_at_the_sum_of_their_ranks(tmp_path):
    stock = {"one": {"r": 2}, "two": {"r": 3, "use_rslora": True}, "three": {"r": 4, "rank_pattern": {"up": 1}}}
    folders = [lora(tmp_path / name, seed=i, **settings) for i, (name, settings) in enumerate(stock.items())]
    report = import_lora(folders, tmp_path / "all", rank=9)
    assert report.error < 1e-12
    ours = PeftModel.from_pretrained(Mlp(), tmp_path / "all").double()
    x = torch.randn(3, 8, dtype=torch.float64)
    for name in stock:
        theirs = PeftModel.from_pretrained(Mlp(), tmp_path / name).double()
        assert relative(ours(x, adapter_names=[name] * 3), theirs(x)) < 1e-6
    assert report.ranks == {"one": 2, "two": 3, "three": 4}
    assert import_lora(folders, tmp_path / "all", overwrite=True).rank == 4


def test_the_report_says_what_is_lost(tmp_path):
    folders = [lora(tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))]
    rank = import_lora(folders, tmp_path / "both").needed
    tensors = load_file(tmp_path / "both" / WEIGHTS)
    report = import_lora(folders, tmp_path / "both", overwrite=True, rank=3, names=["a", "b"], dtype=torch.bfloat16)
    assert load_file(tmp_path / "both" / WEIGHTS).keys() == tensors.keys()
    total = lost = 0.0
    for i, folder in enumerate(folders):
        squares = {}
        for name in ("up", "down"):
            found = read_adapter(folder).factors(name)
            d = delta(found, Shape(0, 0, 0))
            new = load_file(tmp_path / "both" / WEIGHTS)
            made = (
                new[f"base_model.model.{name}.asymlora_B.weight"].double()
                @ new[f"base_model.model.{name}.asymlora_A.weight"][i].double()
            )
            squares[name] = (float((d - made).square().sum()), float(d.square().sum()))
            assert report.lost[name][i] == pytest.approx(squares[name][0] ** 0.5, rel=2e-2)  # bf16 in the file
        part, whole = (sum(s[j] for s in squares.values()) for j in (0, 1))
        assert report.task_error(report.tasks[i]) == pytest.approx((part / whole) ** 0.5, rel=2e-2)
        lost, total = lost + part, total + whole
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=2e-2)
    assert 0.05 < report.error < 1
    assert [row[0] for row in report.table()] == ["a", "b"]
    assert report.worst(1)[0][1] == max(report.module_error("up"), report.module_error("down"))
    for goal, r in rank.items():  # the ranks it names do what it says, and no smaller one does
        assert import_lora(folders, tmp_path / "both", overwrite=True, rank=r).error <= goal
        assert import_lora(folders, tmp_path / "both", overwrite=True, rank=r - 1).error > goal
    report.save(tmp_path / "new" / "errors.csv")
    rows = list(csv.DictReader((tmp_path / "new" / "errors.csv").open()))
    assert [(row["module"], row["task"]) for row in rows] == [("down", "a"), ("down", "b"), ("up", "a"), ("up", "b")]
    assert float(rows[2]["relative_error"]) == pytest.approx(report.lost["up"][0] / report.norms["up"][0])


def test_modules_that_some_do_not_have(tmp_path):
    folders = [lora(tmp_path / "all"), lora(tmp_path / "down", seed=1, target_modules=["down"])]
    report = import_lora(folders, tmp_path / "out", rank=8)
    assert report.missing == {"down": ("up",)}
    assert report.error < 1e-12
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert not tensors["base_model.model.up.asymlora_A.weight"][1].any()
    assert tensors["base_model.model.up.asymlora_A.weight"][0].any()
    stored = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert stored["target_modules"] == ["down", "up"]
    assert "import alora_kernels" in (tmp_path / "out" / "README.md").read_text()


def test_what_peft_itself_saves_as_more_is_refused(tmp_path):
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False))
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="modules_to_save"):
        read_adapter(tmp_path / "head")
    lora(tmp_path / "embed", llama(), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="embed_tokens.*no A or B of a linear layer"):
        read_adapter(tmp_path / "embed")


def test_what_the_reader_refuses_or_changes_nothing_writes_nothing(tmp_path):
    """All that the reader refuses is in `test_adapter_folder`."""

    def refused(match: str, *folders: Path) -> None:
        with pytest.raises(ValueError, match=match):
            import_lora(folders, tmp_path / "out")

    refused("one: no such folder", tmp_path / "one")
    folder = lora(tmp_path / "one")
    refused("one of its subfolders: one", tmp_path)
    good = load_file(folder / WEIGHTS)
    save_file({k: v * (".lora_A." in k) for k, v in good.items()}, folder / WEIGHTS)
    refused("changes nothing", folder)
    change_config(folder, peft_type="ASYMLORA")
    refused("is an ALoRA adapter, not a stock LoRA.*alora export", folder)
    change_config(folder, peft_type="LORA", use_dora=True)
    refused("use_dora=True", folder)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_belong_together(tmp_path):
    one, two = lora(tmp_path / "one"), lora(tmp_path / "two", seed=1)

    def refused(match: str, *folders: Path, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            import_lora(folders, tmp_path / "out", **options)

    change_config(two, base_model_name_or_path="org/other")
    assert import_lora([one, two], tmp_path / "fits").base == "org/other"  # one of them does not say
    change_config(one, base_model_name_or_path="org/base")
    refused(r"different base models: one on org/base, two on org/other.*base_model_name_or_path", one, two)
    change_config(two, base_model_name_or_path="org/base", task_type="SEQ_CLS")
    change_config(one, task_type="CAUSAL_LM")
    refused("one is CAUSAL_LM, two is SEQ_CLS", one, two)
    change_config(two, task_type="CAUSAL_LM")
    tensors = load_file(two / WEIGHTS)
    save_file({**tensors, UP.format("A"): torch.randn(4, 9)}, two / WEIGHTS)
    refused(r"up is 16 x 8 in one but 16 x 9 in two", one, two)
    save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, two / WEIGHTS)
    refused(r"adapter two \(.*two\) changes nothing.*never trained", one, two)
    refused(r"two tasks would be called one: give names", one, one)
    refused("1 names for 2 folders", one, two, names=["a"])
    refused("reserved", one, names=["__base__"])
    refused("at least one adapter folder")
    refused("rank must be >= 1", one, rank=0)
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays_unless_asked(tmp_path, monkeypatch):
    one = lora(tmp_path / "one")
    out = tmp_path / "out"
    import_lora([one], out)
    before = {p: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match="out holds an adapter: say overwrite"):
        import_lora([one], out)

    monkeypatch.setattr(writer, "save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        import_lora([one], out, rank=2, overwrite=True)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
