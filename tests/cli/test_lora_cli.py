"""`alora export` and `alora import`: what they print, what they write, how they fail."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from alora_kernels.adapters.writer import save_adapter

from ..support.adapters import lora_folder
from ..support.cli import alora
from ..support.stock_lora import stock_lora
from ..support.tiny import Mlp, adapted, llama, logits, tokens

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = adapted(llama())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "a base")
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_help_is_complete():
    assert all(word in alora("export", "--help") for word in ("--task", "--rank", "--dtype", "--overwrite", "vLLM"))
    assert all(word in alora("import", "--help") for word in ("--out", "--rank", "--name", "--report", "--overwrite"))


def test_export_prints_folders_and_commands(adapter: Path, tmp_path: Path):
    text = alora("export", adapter, "--out", tmp_path / "out")
    assert "2 stock LoRA folders" in text
    assert re.search(r"math\W+4\W+[\d.]+ [kM]B", text)
    command = (
        f"vllm serve '{tmp_path / 'a base'}' \\\n    --enable-lora --max-loras 3 --max-lora-rank 8 --lora-modules \\\n"
    )
    assert command + f"    math={tmp_path / 'out/math'} \\\n    code={tmp_path / 'out/code'}\n" in text
    assert "sglang.launch_server" in text and "Its dtype is not known here" in text
    model = PeftModel.from_pretrained(llama(), tmp_path / "out" / "code")
    assert not torch.equal(logits(model, tokens()), logits(llama(), tokens()))


def test_export_of_some_tasks_under_other_names(adapter: Path, tmp_path: Path):
    alora("export", adapter, "--out", tmp_path / "out", "--task", "math=sums", "--rank", 8, "--dtype", "bfloat16")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sums"]
    tensor = next(iter(load_file(tmp_path / "out" / "sums" / WEIGHTS).values()))
    assert tensor.dtype == torch.bfloat16
    assert 8 in tensor.shape


def test_export_without_a_base_name_says_so(tmp_path: Path):
    save_adapter(adapted(Mlp(), task_type=None, target_modules=["up"]), tmp_path / "adapter")
    text = alora("export", tmp_path / "adapter", "--out", tmp_path / "out", "--task", "code", "--rank", 600)
    assert "1 stock LoRA folder in" in text
    assert "put it in the place of BASE_MODEL" in text
    assert "vLLM serves ranks up to 512; this is 600" in text
    assert "vllm serve" not in text


def test_export_refuses_in_one_line(adapter: Path, tmp_path: Path):
    assert "unknown task 'law'" in alora("export", adapter, "--task", "law", "--out", tmp_path / "out", code=2)
    assert "--dtype must be one of" in alora("export", adapter, "--dtype", "int8", "--out", tmp_path / "out", code=2)
    assert "has no adapter_config.json" in alora("export", tmp_path, "--out", tmp_path / "out", code=2)
    alora("export", adapter, "--out", tmp_path / "out")
    assert "--overwrite" in alora("export", adapter, "--out", tmp_path / "out", code=2)
    alora("export", adapter, "--out", tmp_path / "out", "--overwrite")


def test_import_of_exported_folders_is_exact(adapter: Path, tmp_path: Path):
    alora("export", adapter, "--out", tmp_path / "out")
    text = alora("import", tmp_path / "out/math", tmp_path / "out/code", "--out", tmp_path / "back")
    assert "2 LoRAs as one adapter with one B of rank 4" in text
    assert re.search(r"math\W+4\W+exact", text)
    assert "lose most" not in text
    assert f"adapter saved: {tmp_path / 'back'}" in text
    assert "holds an adapter" in alora("import", tmp_path / "out/math", "--out", tmp_path / "back", code=2)


def test_import_says_what_is_lost(tmp_path: Path):
    for name, targets in (("one", ["up", "down"]), ("two", ["up"])):
        model = stock_lora(Mlp(), target_modules=targets)
        torch.manual_seed(len(name + targets[-1]))
        for parameter in model.parameters():
            parameter.data.normal_()
        model.save_pretrained(tmp_path / name)
    args = ("import", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both")
    names = ("--name", "first", "--name", "second")
    text = alora(*args, *names, "--rank", 2, "--report", tmp_path / "errors.csv")
    assert re.search(r"first\W+4\W+\d+\.\d\d %", text)
    assert re.search(r"all\W+\d+\.\d\d %", text)
    assert re.search(r"down\W+\d+\.\d\d %", text)
    ranks = re.findall(r"--rank (\d+) \([\d.]+ kB\) is the smallest that loses at most (\d+) % over all", text)
    assert [goal for _, goal in ranks] == ["10", "1"]
    assert "second has no adapter at 1 module and leaves the base there: down" in text
    assert len(list(csv.reader((tmp_path / "errors.csv").open()))) == 5
    assert "exact" in alora(*args, "--rank", 8, "--overwrite")
    assert "2 names for 1 folders" in alora("import", tmp_path / "one", *names, "--out", tmp_path / "b", code=2)


def test_verify_says_what_a_folder_is_and_finds_a_changed_bit(adapter: Path, tmp_path: Path):
    text = alora("verify", adapter)
    assert "ALoRA adapter for" in text and "2 tasks: math, code" in text and "rank 4, float32" in text
    assert "tensors: as written, by SHA-256" in text
    assert "tensors: finite; it has no checksums" in alora("verify", lora_folder(tmp_path / "stock", llama()))
    data = bytearray((adapter / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (adapter / WEIGHTS).write_bytes(data)
    assert "does not have the SHA-256 it was written with" in alora("verify", adapter, code=2)
