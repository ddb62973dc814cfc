"""Adapter folders: what is read is what was saved, and what cannot be served is refused with its reason."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.export import export_lora
from alora_kernels.adapters.reader import AdapterChangedError, AdapterFile, Shape, read_adapter
from alora_kernels.tensor_file import DamagedFileError, TensorFile
from alora_kernels.tuner.layer import ALoRALayer
from tests.support.adapters import CONFIG, MLP, WEIGHTS, Mlp, alora_folder, change_config, change_weights, lora_folder


@pytest.fixture
def alora(tmp_path: Path) -> Path:
    return alora_folder(tmp_path / "alora", Mlp(), ["math", "code"], **MLP)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return lora_folder(tmp_path / "movie", Mlp(), **MLP)


def test_an_alora_folder_reads_as_it_was_saved(alora):
    file, saved = read_adapter(alora), load_file(alora / WEIGHTS)
    assert (file.config.kind, file.tasks, file.base) == ("alora", ("math", "code"), "tiny-random")
    assert (file.dtype, file.rank, file.stamp.bytes) == (torch.float32, 4, (alora / WEIGHTS).stat().st_size)
    assert file.shapes == {"up": Shape(16, 4, 8), "down": Shape(4, 4, 16)}
    assert file.scaling == {"up": 2.0, "down": 2.0}  # alpha defaults to 2 r
    for module in ("up", "down"):
        assert torch.equal(file.b[module], saved[f"base_model.model.{module}.asymlora_B.weight"])
        for row, task in enumerate(file.tasks):
            assert torch.equal(file.matrices(task)[module], saved[f"base_model.model.{module}.asymlora_A.weight"][row])


def test_a_stock_lora_folder_is_one_task_named_after_it(lora):
    file, saved = read_adapter(lora), load_file(lora / WEIGHTS)
    assert (file.config.kind, file.tasks, file.scaling["up"]) == ("lora", ("movie",), 2.0)  # alpha 8 / r 4
    for module in ("up", "down"):
        a, b = (saved[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(file.b[module], b)
        assert torch.equal(file.matrices("movie")[module], a)
        factors = file.factors(module)
        assert torch.equal(factors.a, a) and torch.equal(factors.b, b) and factors.s == 2.0


@pytest.mark.parametrize("make", [alora_folder, lora_folder])
@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_of_patterns_is_that_of_the_layers(tmp_path, make, rslora):
    settings: dict[str, Any] = {"rank_pattern": {"do.n": 2}, "alpha_pattern": {"up": 3}, "use_rslora": rslora} | MLP
    folder = make(tmp_path / "a", Mlp(), *([["math"]] if make is alora_folder else []), **settings)
    file = read_adapter(folder)
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    layers = {
        n.removeprefix("base_model.model."): m
        for n, m in PeftModel.from_pretrained(Mlp(), folder).named_modules()
        if isinstance(m, ALoRALayer | LoraLayer)
    }
    assert layers.keys() == file.scaling.keys() == {"up", "down"}
    for module, layer in layers.items():
        alora = isinstance(layer, ALoRALayer)
        assert file.scaling[module] == (layer.asymlora_spec["default"].scaling if alora else layer.scaling["default"])
    assert {m: at.r for m, at in file.shapes.items()} == {"up": 4, "down": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path, dtype):
    file = read_adapter(alora_folder(tmp_path / "a", Mlp(), ["math"], dtype=dtype, **MLP))
    assert file.dtype == file.b["up"].dtype == file.matrices("math")["up"].dtype == dtype


def test_the_widest_dtype_of_mixed_ones(alora):
    change_weights(alora, lambda t: t.update({k: v.half() for k, v in t.items() if "A" in k.rpartition("_")[2]}))
    assert read_adapter(alora).dtype == torch.float32


def test_what_was_read_does_not_hang_on_the_file(alora):
    file = read_adapter(alora)
    b, a = file.b["up"].clone(), file.matrices("code")
    kept = {m: t.clone() for m, t in a.items()}
    (alora / WEIGHTS).write_bytes(b"\0" * (alora / WEIGHTS).stat().st_size)  # in place: a view would follow
    assert torch.equal(file.b["up"], b)
    assert all(torch.equal(a[m], kept[m]) for m in a)


def test_a_file_replaced_after_it_was_read_is_refused(alora, tmp_path):
    file = read_adapter(alora)
    other = alora_folder(tmp_path / "other", Mlp(), ["math", "code"], seed=5, **MLP)
    os.replace(other / WEIGHTS, alora / WEIGHTS)
    for read in (lambda: file.matrices("math"), lambda: file.factors("up"), lambda: file.b):
        with pytest.raises(AdapterFolderError, match="changed while it was read"):
            read()


def test_a_folder_written_into_while_it_is_read_is_read_once_more_and_no_more(alora, monkeypatch):
    """Same sizes, in place, as `cp` over a live folder does."""
    data, finite, turns = (alora / WEIGHTS).read_bytes(), TensorFile.finite, []

    def writing(self: TensorFile, key: str) -> bool:
        if len(turns) < limit:
            turns.append(key)
            time.sleep(0.03)
            (alora / WEIGHTS).write_bytes(data)
        return finite(self, key)

    monkeypatch.setattr(TensorFile, "finite", writing)
    limit = 1
    assert read_adapter(alora).tasks == ("math", "code") and turns
    limit = 99
    with pytest.raises(AdapterChangedError, match="changed while it was read: load the folder again"):
        read_adapter(alora)


def test_what_does_not_fit_a_base_is_refused_before_a_number_is_read(alora, monkeypatch):
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(TensorFile, "pieces", lambda *_: pytest.fail("read"))

    def no(file: AdapterFile) -> None:
        raise AdapterFolderError(f"{file.shapes['up']}")

    with pytest.raises(AdapterFolderError, match=r"Shape\(n=16, r=4, k=8,"):
        read_adapter(alora, fits=no)


def flipped(folder: Path) -> None:
    """One bit of the last number."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def test_a_changed_bit_is_refused_by_every_reader(alora, tmp_path):
    assert read_adapter(alora).sums == 4
    PeftModel.from_pretrained(Mlp(), alora)
    export_lora(alora, tmp_path / "out")
    flipped(alora)
    flipped(tmp_path / "out" / "math")
    for folder in (alora, tmp_path / "out" / "math"):
        with pytest.raises(AdapterFolderError, match="does not have the SHA-256 it was written with"):
            read_adapter(folder)
    with pytest.raises(DamagedFileError, match=r"asymlora_.\.weight does not have the SHA-256"):
        PeftModel.from_pretrained(Mlp(), alora)


def test_a_stock_folder_has_no_checksums_and_is_read(lora):
    assert read_adapter(lora).sums == 0


def test_nothing_is_kept_until_it_is_asked_for(alora):
    """Folders are imported together that do not fit into the memory together."""
    file = read_adapter(alora)
    file.matrices("math"), file.factors("up")
    assert vars(file).keys() == {
        "folder",
        "config",
        "shapes",
        "scaling",
        "dtype",
        "keys",
        "copies",
        "stamp",
        "row",
        "sums",
        "b_sums",
    }
    assert file.b is file.b


def test_the_other_kind_is_refused_with_the_command_that_makes_it(alora, lora):
    assert (read_adapter(alora, only="alora").tasks, read_adapter(lora, only="lora").tasks) == (
        ("math", "code"), ("movie",),
    )  # fmt: skip
    with pytest.raises(AdapterFolderError, match="is an ALoRA adapter, not a stock LoRA: `alora export`"):
        read_adapter(alora, only="lora")
    with pytest.raises(AdapterFolderError, match="is a stock LoRA, not an ALoRA adapter: `alora import`"):
        read_adapter(lora, only="alora")


def test_settings_that_leave_the_adapter_at_a_and_b(alora, lora):
    """How it started and where it was trained: the numbers are the same, and so is what is read."""
    scaling = read_adapter(lora).scaling
    starts = {"corda_config": {"beta": 1}, "loftq_config": {"loftq_bits": 4}, "lora_ga_config": {"stable_gamma": 16}}
    change_config(lora, init_lora_weights=None, lora_dropout=0.5, use_rslora=None, **starts)
    assert read_adapter(lora).scaling == scaling
    change_config(alora, tasks=2)
    assert read_adapter(alora).tasks == ("0", "1")


def test_what_a_config_leaves_out_is_what_peft_takes(tmp_path):
    """PEFT's own defaults: r = 8 and alpha = 8 for LoRA, alpha = 2 r for ALoRA."""
    for make, args, s in ((alora_folder, [["math"]], 2.0), (lora_folder, [], 1.0)):
        folder = make(tmp_path / make.__name__, Mlp(), *args, r=8, **MLP)
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k not in ("r", "lora_alpha")}))
        file = read_adapter(folder)
        assert (file.rank, file.scaling) == (8, {"up": s, "down": s})


def test_a_name_with_a_space_is_a_name(tmp_path):
    base = torch.nn.ModuleDict({"my up": torch.nn.Linear(3, 5)})
    assert read_adapter(alora_folder(tmp_path / "a", base, ["x"], target_modules=["my up"], task_type=None)).shapes == {
        "my up": Shape(5, 4, 3)
    }


def test_an_unknown_task(alora):
    with pytest.raises(AdapterFolderError, match="no task 'law'.*'math', 'code'"):
        read_adapter(alora).matrices("law")


def edit(**settings: Any) -> Any:
    return lambda folder: change_config(folder, **settings)


def config_bytes(data: bytes) -> Any:
    return lambda folder: (folder / CONFIG).write_bytes(data)


def weights(change: Any) -> Any:
    return lambda folder: change_weights(folder, change)


def cut(keep: float) -> Any:
    def shorten(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])

    return shorten


def pickled_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def not_finite(part: str, value: float) -> Any:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.down.asymlora_{part}.weight"][-1, -1] = value  # the last task

    return weights(spoil)


UP = "base_model.model.up."
REFUSED = [
    (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    (lambda f: (f / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    (pickled_only, "a pickle, which could run code"),
    (lambda f: (pickled_only(f), config_bytes(b"[]")(f)), "a pickle, which could run code"),
    (config_bytes(b"{"), "does not read"),
    (config_bytes(b"[]"), "holds a list"),
    (config_bytes(b"\xff\xfe"), "does not read"),
    (config_bytes(b"[" * 100_000), "does not read"),
    (config_bytes(b'{"a": "' + b"x" * 2**20 + b'"}'), "larger than 1048576 bytes"),
    (edit(peft_type="IA3"), "'IA3' adapter"),
    (edit(peft_type=None), "None adapter"),
    (edit(peft_type=["LORA"]), "only ASYMLORA"),
    (edit(routing="dense"), "routing must be task or soft"),
    (edit(routing="soft"), "weighs its experts for each token anew: it has no tasks.*no fixed LoRA.*generate"),
    (edit(modules_to_save=["head"]), r"modules_to_save=\['head'\] \(modules trained in full\), which is more than A"),
    (edit(bias="all"), r"holds biases \(bias='all'\)"),
    (edit(lora_bias=True), "bias on B"),
    (edit(layer_replication=[[0, 1]]), "layer_replication"),
    (edit(use_dora=True), r"holds use_dora=True \(DoRA.*more than A and B.*train without it"),
    (edit(trainable_token_indices=[1]), "holds trainable_token_indices.*token embeddings"),
    (edit(alora_invocation_tokens=[1]), "holds alora_invocation_tokens.*Activated LoRA"),
    (edit(a_setting_of_tomorrow=7), "holds a_setting_of_tomorrow=7"),
    (edit(**{"\x1b[2J\ud800": "\x07"}), r"holds \?\[2J\?=\?, which"),
    (
        edit(init_lora_weights="pissa_niter_4"),
        "starts from a base that it changed.*path_initial_model_for_weight_conversion",
    ),
    (edit(r=0), "r must be a whole number"),
    (edit(r=True), "r must be a whole number"),
    (edit(r=8), "down has rank 4 but adapter_config.json says 8.*do not belong together"),
    (edit(lora_alpha=float("nan")), "lora_alpha must be a finite number"),
    (edit(lora_alpha="8"), "lora_alpha must be a finite number"),
    (edit(lora_alpha=10**400), "lora_alpha must be a finite number"),
    (edit(r=10**400), "r must be a whole number"),
    (edit(use_rslora="yes"), "use_rslora must be true or false"),
    (edit(rank_pattern=[4]), "rank_pattern must map"),
    (edit(alpha_pattern={"up": "x"}), "must be a finite number"),
    (edit(alpha_pattern={"(a+)+b": 3}), "may take long to match.*one .* at most"),
    (edit(alpha_pattern={".*a.*b": 3}), "may take long"),
    (edit(alpha_pattern={"(up": 3}), "may take long"),
    (edit(alpha_pattern={"a" * 201: 3}), "may take long"),
    (edit(rank_pattern={f"m{i}": 3 for i in range(4097)}), "has 4097 keys"),
    (edit(tasks=None), "tasks must be a list"),
    (edit(tasks=2**16 + 1), "tasks must be a list of names, or at most 65536"),
    (edit(tasks=0), "at least one task"),
    (edit(tasks=True), "tasks must be a list"),
    (edit(tasks=["a", "a"]), "must be unique"),
    (edit(tasks=["a", 1]), "must be strings"),
    (edit(tasks=["a", "b", "c"]), r"A is \[2, 4, 16\] .*must be \[3 tasks, R, K\]"),
    (cut(0), "cut short or damaged"),
    (cut(0.1), "cut short or damaged"),
    (cut(0.9), "cut short or damaged"),
    (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 999), "cut short or damaged"),
    (lambda f: save_file({}, f / WEIGHTS), "holds no tensor"),
    (weights(lambda t: t.pop(UP + "asymlora_A.weight")), "up has no A"),
    (weights(lambda t: t.pop(UP + "asymlora_B.weight")), "up has no B"),
    (weights(lambda t: t.update({UP + "asymlora_A.weight": torch.ones(2, 3, 8)})), "must be"),
    (weights(lambda t: t.update({UP + "asymlora_A.weight": torch.ones(2, 8)})), "must be.*without convolutions"),
    (weights(lambda t: t.update({UP + "asymlora_A.weight": torch.ones(2, 4, 8, 1, 1)})), "without convolutions"),
    (weights(lambda t: t.update({UP + "asymlora_B.weight": torch.ones(())})), "must be"),
    (weights(lambda t: t.update({UP + "asymlora_A.weight": torch.ones(2, 4, 0)})), "must be"),
    (
        weights(lambda t: t.update({UP + "asymlora_B.weight": torch.ones(16, 4, dtype=torch.int32)})),
        "up is stored as I32",
    ),
    (weights(lambda t: t.update({UP + "asymlora_router.weight": torch.ones(2, 8)})), "router.weight', no A or B"),
    (weights(lambda t: t.update({"base_model.model.head.weight": torch.ones(2, 8)})), "holds 'base_model.model.head"),
    (weights(lambda t: t.update({UP + "weight": torch.ones(1)})), "up.weight', no A or B"),
    (weights(lambda t: t.update({UP + "lora_magnitude_vector": torch.ones(16)})), "holds '.*magnitude"),
    (weights(lambda t: t.update({"base_model.model.\x1b[2J.asymlora_A.weight": torch.ones(2)})), r"holds '.*\\x1b\[2J"),
    (weights(lambda t: t.update({f"{UP}{'x' * 254}.asymlora_A.weight": torch.ones(2)})), "holds '.*x', no A or B"),
    (not_finite("A", float("nan")), "down holds numbers that are not finite"),
    (not_finite("B", float("inf")), "down holds numbers that are not finite"),
]


@pytest.mark.parametrize(("spoil", "why"), REFUSED, ids=[f"{i}-{why[:20]}" for i, (_, why) in enumerate(REFUSED)])
def test_what_cannot_be_served_is_refused_with_its_reason(alora, spoil, why):
    spoil(alora)
    with pytest.raises(AdapterFolderError, match=f"^{re.escape(str(alora))}: .*{why}"):
        read_adapter(alora)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "holds biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "olora"}, "starts from a base that it changed"),
    ],
)
def test_stock_loras_that_are_more_than_a_and_b(tmp_path, settings, why):
    folder = lora_folder(tmp_path / "a", Mlp(), **(MLP | settings))
    with pytest.raises(AdapterFolderError, match=why):
        read_adapter(folder)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    if settings.get("init_lora_weights") is None:  # then the tensors tell
        with pytest.raises(AdapterFolderError, match="no A or B of a linear layer"):
            read_adapter(folder)


def test_paths_that_are_no_folder(tmp_path, alora):
    with pytest.raises(AdapterFolderError, match="no such folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterFolderError, match="is a file: give the folder"):
        read_adapter(alora / WEIGHTS)
    with pytest.raises(AdapterFolderError, match="one of its subfolders: alora"):
        read_adapter(tmp_path)
    deep = str(tmp_path)
    while len(deep) < 4085:  # the folder's own name is within Linux's 4096 bytes, that of its config is not
        deep += "/" + "x" * min(200, 4085 - len(deep) - 1)
    if sys.platform.startswith("linux"):
        os.makedirs(deep)
    for path in (deep, tmp_path / ("x" * 4000)):
        with pytest.raises(AdapterFolderError, match="cannot be looked at|no such folder"):
            read_adapter(path)


def test_a_hostile_pickle_is_not_read_even_beside_good_weights(alora, tmp_path):
    class Touch:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    (alora / "adapter_model.bin").write_bytes(pickle.dumps(Touch()))
    read_adapter(alora)
    (alora / WEIGHTS).unlink()
    with pytest.raises(AdapterFolderError, match="pickle"):
        read_adapter(alora)
    assert not (tmp_path / "owned").exists()


def test_the_package_imports_neither_peft_nor_transformers():
    code = "import sys, alora_kernels.serving; print({'peft', 'transformers', 'fastapi'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
