"""ALoRA to stock LoRA: the same answers under PEFT alone, whole folders or none, clear refusals."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from alora_kernels.adapters import writer
from alora_kernels.adapters.export import VLLM_RANKS, ExportedTask, ExportReport, export_lora
from alora_kernels.adapters.writer import save_adapter

from ..support.adapters import CONFIG, WEIGHTS, change_config, half_written
from ..support.tiny import Mlp, adapted, bert, config, gpt2, llama, logits, tokens

TASKS = ["math", "code"]
PATTERNS = {"r": 3, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 5}}


def saved(path: Path, model: PeftModel) -> Path:
    save_adapter(model, path)
    return path


def assert_same_answers(stock: PeftModel, model: PeftModel, task: str) -> None:
    """As in tests/compare.py: equal in float64, and an error of at most twice the other's in the models' own dtype."""
    names = {"adapter_names": [task] * 2}
    exact = logits(deepcopy(model).double(), tokens(), **names)
    for same in (deepcopy(stock).double(), deepcopy(stock).double().merge_and_unload()):
        assert relative(logits(same, tokens()), exact) <= 1e-6  # s B is rounded to float32 once
    own, err = relative(logits(model, tokens(), **names), exact), relative(logits(stock, tokens()), exact)
    assert err <= 2 * own + (1e-6 if model.dtype == torch.float32 else torch.finfo(model.dtype).eps)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (llama, {}),
        (llama, PATTERNS),
        (llama, {"use_rslora": True, "lora_alpha": 7}),
        (llama, {**PATTERNS, "use_rslora": True}),
        (llama, {"target_modules": r".*layers\.1\..*(q|v)_proj"}),
        (llama, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0]}),
        (llama, {"exclude_modules": ["v_proj"]}),
        (gpt2, {}),
        (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "r": 5}),
    ],
)
@pytest.mark.parametrize("from_folder", [True, False])
def test_stock_peft_gives_the_same_logits(tmp_path, base, settings, from_folder):
    model = adapted(base(), **settings)
    report = export_lora(saved(tmp_path / "ours", model) if from_folder else model, tmp_path / "out")
    for task, written in zip(TASKS, report.tasks, strict=True):
        stock = PeftModel.from_pretrained(base(), written.folder)
        assert_same_answers(stock, model, task)
        with pytest.raises(AssertionError):  # or the comparison would say nothing
            assert_same_answers(stock, model, TASKS[task == "math"])


def test_bf16_to_rounding(tmp_path):
    model = adapted(llama().to(torch.bfloat16))
    export_lora(model, tmp_path)
    for task in TASKS:
        assert_same_answers(PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path / task), model, task)


def test_peft_alone_loads_it(tmp_path):
    model = adapted(Mlp(), task_type=None, target_modules=["up", "down"])
    export_lora(model, tmp_path / "out")
    x = torch.randn(2, 8)
    save_file({"x": x, **{f"w.{k}": v for k, v in Mlp().state_dict().items()}}, tmp_path / "in.safetensors")
    code = f"""
import sys, torch
from collections import OrderedDict
from safetensors.torch import load_file, save_file
from peft import PeftModel
t = load_file(r"{tmp_path}/in.safetensors")
net = torch.nn.Sequential(OrderedDict(up=torch.nn.Linear(8, 16), act=torch.nn.Tanh(), down=torch.nn.Linear(16, 4)))
net.load_state_dict({{k[2:]: v for k, v in t.items() if k.startswith("w.")}})
model = PeftModel.from_pretrained(net, r"{tmp_path}/out/code")
with torch.no_grad():
    save_file({{"y": model(t["x"])}}, r"{tmp_path}/out.safetensors")
assert not any(name.startswith("alora_kernels") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        ours = model(x, adapter_names=["code"] * 2)
    assert relative(load_file(tmp_path / "out.safetensors")["y"], ours) <= 1e-6


def test_the_files_are_what_servers_read(tmp_path):
    model = adapted(**PATTERNS, base=None)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    report = export_lora(saved(tmp_path / "ours", model), tmp_path / "out")
    assert (report.rank, report.base, report.modules) == (6, "org/base", 14)
    stored = json.loads((tmp_path / "out/math" / CONFIG).read_text())
    wanted = {"peft_type": "LORA", "r": 6, "lora_alpha": 6, "use_rslora": False, "rank_pattern": {}, "bias": "none",
              "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "modules_to_save": None,
              "init_lora_weights": True, "use_dora": False, "inference_mode": True}  # fmt: skip
    assert {key: stored[key] for key in wanted} == wanted
    assert stored["target_modules"] == sorted(stored["target_modules"])
    assert set(stored["target_modules"]) == set(model.peft_config["default"].target_modules)
    tensors, other = (load_file(tmp_path / "out" / task / WEIGHTS) for task in TASKS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert (tensors[key.format("A")].shape, tensors[key.format("B")].shape) == ((6, 32), (32, 6))
    assert not tensors[key.format("A")][2:].any()
    assert torch.equal(tensors[key.format("B")], other[key.format("B")])
    assert not torch.equal(tensors[key.format("A")], other[key.format("A")])
    assert "task `math`" in (tmp_path / "out/math/README.md").read_text()
    assert report.tasks[0].bytes == (tmp_path / "out/math" / WEIGHTS).stat().st_size
    assert sorted(p.name for p in (tmp_path / "out/math").iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_targets_that_a_list_cannot_say_are_named_in_full(tmp_path):
    model = adapted(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    export_lora(model, tmp_path)
    names = json.loads((tmp_path / "math" / CONFIG).read_text())["target_modules"]
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_rank_dtype_and_names(tmp_path):
    model = adapted(r=3)
    report = export_lora(model, tmp_path, tasks={"code": "python"}, rank=8, dtype=torch.bfloat16)
    assert [p.name for p in tmp_path.iterdir()] == ["python"]
    assert report.table() == [("python", str(tmp_path / "python"), 8, report.tasks[0].bytes)]
    tensors = load_file(tmp_path / "python" / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    export_lora(model, tmp_path, rank=8)
    wide = load_file(tmp_path / "code" / WEIGHTS)
    assert all(torch.equal(t, wide[key].to(torch.bfloat16)) for key, t in tensors.items())
    assert_same_answers(PeftModel.from_pretrained(llama(), tmp_path / "code"), model, "code")
    with pytest.raises(ValueError, match=r"rank must be at least 3.*got 2"):
        export_lora(model, tmp_path, rank=2)
    with pytest.raises(ValueError, match=r"unknown task 'maths'.*math, code"):
        export_lora(model, tmp_path, tasks=["maths"])
    with pytest.raises(ValueError, match="use \\['math'\\]"):
        export_lora(model, tmp_path, tasks="math")


def test_a_model_in_memory_may_use_patterns_that_no_folder_may(tmp_path):
    model = adapted(rank_pattern={".*layers.*self.*q_proj": 2})  # three repetitions
    assert export_lora(model, tmp_path / "out").rank == 4
    with pytest.raises(ValueError, match="may take long to match.*name the modules"):
        export_lora(saved(tmp_path / "ours", model), tmp_path / "more")


def test_commands(tmp_path):
    def report(rank: int, dtype: str | None = None) -> ExportReport:
        tasks = tuple(ExportedTask(n, n, Path("/a b") / n, 1) for n in TASKS)
        return ExportReport("org/base", rank, 1, tasks, dtype)

    words = shlex.split(report(20).vllm_command.replace("\\\n", " "))
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert words[-3:] == ["--lora-modules", "math=/a b/math", "code=/a b/code"]
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert words[words.index("--max-loras") + 1] == "3"  # with every slot taken the base answers as the last task
    assert "--enable-lora" in words
    words = shlex.split(report(20).sglang_command.replace("\\\n", " "))
    assert words[:5] == ["python", "-m", "sglang.launch_server", "--model-path", "org/base"]
    assert words[-3:] == ["--lora-paths", "math=/a b/math", "code=/a b/code"]
    assert words[words.index("--max-loras-per-batch") + 1] == "3"
    for command in (report(20, "float32").vllm_command, report(20, "float32").sglang_command):
        words = shlex.split(command.replace("\\\n", " "))
        assert words[words.index("org/base") + 1 :][:2] == ["--dtype", "float32"]
    assert [report(r).vllm_rank for r in (1, 2, 16, 17, 512, 513)] == [1, 8, 16, 32, 512, None]
    assert report(600).vllm_command is None
    assert report(600).sglang_command
    assert list(VLLM_RANKS) == sorted(VLLM_RANKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_commands_name_the_dtype_of_the_base(tmp_path, dtype):
    """A base in memory, a base in a folder; not one that is only a name."""
    base = llama().to(dtype)
    base.save_pretrained(tmp_path / "base")
    name = str(dtype).removeprefix("torch.")
    model = adapted(base)
    assert export_lora(model, tmp_path / "a").dtype == name
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    folder = saved(tmp_path / "ours", model)
    assert export_lora(folder, tmp_path / "b").dtype == name
    (tmp_path / "base" / "config.json").write_text("[")
    report = export_lora(folder, tmp_path / "c")
    assert report.dtype is None and "--dtype" not in report.vllm_command + report.sglang_command


def test_what_no_fixed_lora_equals_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weighs its experts for each token anew.*no fixed LoRA equals it"):
        export_lora(saved(tmp_path / "soft", adapted(routing="soft")), tmp_path / "out")
    head = adapted(bert(), task_type="SEQ_CLS", modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"modules_to_save=.*classifier.*modules trained in full"):
        export_lora(head, tmp_path / "out")
    model = adapted()
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 active ALoRA adapters.*set_adapter"):
        export_lora(model, tmp_path / "out")
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="0 active ALoRA adapters"):
        export_lora(lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_active_adapter_of_a_model(tmp_path):
    model = adapted()
    model.add_adapter("other", config(r=2, tasks=["law"]))
    model.set_adapter("other")
    assert [t.name for t in export_lora(model, tmp_path).tasks] == ["law"]
    model.set_adapter("default")
    assert [t.name for t in export_lora(model, tmp_path).tasks] == TASKS


def test_unsafe_names_are_refused_with_the_remedy(tmp_path):
    for name in ("../up", "a/b", ".hidden", "", "two words", "x=y", "x" * 65):
        model = adapted(tasks=[name, "fine"])
        with pytest.raises(ValueError, match=r"cannot name a folder.*tasks=\{.*--task"):
            export_lora(model, tmp_path / "out")
        export_lora(model, tmp_path / "ok", tasks={name: "renamed"}, overwrite=True)
    with pytest.raises(ValueError, match="two tasks would be written to the folder 'math'"):
        export_lora(adapted(), tmp_path / "out", tasks={"math": "math", "code": "Math"})
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something(tmp_path):
    model = adapted()
    export_lora(model, tmp_path, tasks=["code"])
    before = (tmp_path / "code" / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"code holds an adapter: say overwrite"):
        export_lora(model, tmp_path)
    assert not (tmp_path / "math").exists()  # all folders are looked at before the first is written
    export_lora(model, tmp_path, rank=8, overwrite=True)
    assert (tmp_path / "code" / WEIGHTS).read_bytes() != before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="notes is not empty and holds no adapter"):
        export_lora(model, tmp_path, tasks={"math": "notes"}, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file"):
        export_lora(model, tmp_path, tasks={"math": "file"})


def test_an_interrupted_export_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    model = adapted()
    export_lora(model, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    monkeypatch.setattr(writer, "save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        export_lora(adapted(r=2), tmp_path, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_the_reader_refuses_or_no_number_holds_writes_nothing(tmp_path):
    """All that the reader refuses is in `test_adapter_folder`."""
    folder = saved(tmp_path / "ours", adapted(Mlp(), task_type=None, target_modules=["up"]))
    save_file({k: v * 1e5 for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="too large for torch.float16"):
        export_lora(folder, tmp_path / "out", dtype=torch.float16)
    change_config(folder, r=3)
    get_peft_model(Mlp(), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path / "lora")
    for refused, match in (
        (folder, r"up has rank 4 but adapter_config.json says 3.*do not belong together"),
        (tmp_path / "lora", "is a stock LoRA, not an ALoRA adapter"),
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (tmp_path, "has no adapter_config.json"),
    ):
        with pytest.raises(ValueError, match=match):
            export_lora(refused, tmp_path / "out")
    assert not (tmp_path / "out").exists()
