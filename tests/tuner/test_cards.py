"""The model card that is saved and pushed: what it says, what stays, and that no path leaves with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel

from alora_kernels import route, save_adapter
from alora_kernels.adapters.config import checked_config
from alora_kernels.tuner.card import IMPORT, MARK, hub_id, told

from ..support.tiny import adapted, llama, logits, tokens

CONFIG = "adapter_config.json"


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def based_on(name: str, **settings: Any) -> Any:
    """An adapted model, B not zero, whose base was loaded under that name."""
    base = llama()
    base.name_or_path = base.config._name_or_path = name
    return adapted(base, **({"init_weights": False} | settings))


def saved_base(folder: Path) -> Path:
    llama().save_pretrained(folder)
    return folder


def test_bases_by_the_names_that_others_know(tmp_path, monkeypatch):
    assert hub_id("org/base-1.5") == "org/base-1.5" and hub_id("gpt2") == "gpt2"
    assert hub_id("/home/me/hub/models--org--a.b--c/snapshots/0f3/") == "org/a.b--c".replace("--", "/")
    (tmp_path / "org/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [hub_id(name) for name in (None, "", "/gone/base", "./base", "~/base", "org/base", "a/b/c")] == [None] * 7
    assert told("org/other") == "org/other" and told("/gone/base") == "a local base"
    recognised = told(str(saved_base(tmp_path / "secret")))
    assert recognised.startswith("a local base (LlamaForCausalLM, 2 layers of width ") and "secret" not in recognised


def test_a_saved_card_says_what_it_is_and_how_it_is_loaded(tmp_path):
    based_on("org/base").save_pretrained(tmp_path, save_embedding_layers=False)
    data, text = card_of(tmp_path)
    assert data["base_model"] == "org/base" and data["library_name"] == "peft"
    assert {"asymlora", "base_model:adapter:org/base"} <= set(data["tags"])
    assert "More Information Needed" not in text and text.count(IMPORT) == 1
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text and 'adapter_names=["math", "__base__"]' in text
    assert "- `math`\n- `code`" in text


def test_a_card_says_how_tasks_are_asked_and_with_which_commands(tmp_path):
    from alora_kernels.tuner.card import model_card

    based_on("org/base").save_pretrained(tmp_path, save_embedding_layers=False)
    config = PeftConfig.from_pretrained(tmp_path)
    assert "## Asking" not in model_card(config)
    text = model_card(config, asked={"code": '"Code: {text}\\nGood:" with yes, no'}, more="the end")
    assert '- `math`\n- `code`: `"Code: {text}\\nGood:" with yes, no`\n' in text and text.endswith("the end")
    assert 'generate path/of/this/adapter --task code "some text"' in text and "alora serve org/base --adapter" in text
    snippet = text[text.index("from openai") :].partition("```")[0]
    assert compile(snippet, "snippet", "exec") and 'model="code"' in snippet


def test_a_card_of_soft_routing_and_of_a_plain_module_make_sense(tmp_path):
    soft = {"routing": "soft", "tasks": None, "num_experts": 3}
    based_on("org/base", **soft).save_pretrained(tmp_path, save_embedding_layers=False)
    text = card_of(tmp_path)[1]
    assert "3 A, which a learned router weighs" in text and "adapter_names" not in text and "## Tasks" not in text


def test_no_path_stands_in_a_card_and_the_folder_still_loads(tmp_path):
    base = saved_base(tmp_path / "home" / "base")
    model = based_on(str(base))
    save_adapter(model, tmp_path / "adapter")
    data, text = card_of(tmp_path / "adapter")
    assert str(tmp_path) not in text and "base_model" not in data and "base = ...  # a local base (Llama" in text
    from peft import AutoPeftModelForCausalLM

    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # by the path in the config
    with route([1, 0]):
        assert logits(again, tokens()).allclose(logits(model, tokens()))


def test_a_card_that_somebody_wrote_stays_and_one_of_ours_is_written_anew(tmp_path):
    model = based_on("org/base")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: org/mine\n---\n\n# My words\n")
    save_adapter(model, tmp_path)
    save_adapter(model, tmp_path)
    data, text = card_of(tmp_path)
    assert "# My words" in text and text.count(IMPORT) == 1 and MARK not in text
    assert data["license"] == "mit" and data["base_model"] == "org/base"
    save_adapter(model, tmp_path / "ours")
    other = adapted(llama(), tasks=["law"])
    save_adapter(other, tmp_path / "ours")
    assert "`law`" in card_of(tmp_path / "ours")[1] and "`math`" not in card_of(tmp_path / "ours")[1]


@pytest.mark.parametrize("local", [True, False])
def test_a_push_takes_the_card_along_and_no_path(tmp_path, monkeypatch, local):
    """transformers writes a card of its own over the saved one just before it uploads."""
    pushed: dict[str, str] = {}

    class Api:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> str:
            for operation in operations:
                content = operation.path_or_fileobj
                pushed[operation.path_in_repo] = Path(content).read_bytes().decode("latin-1")
            return "done"

    from transformers.utils import hub

    monkeypatch.setattr(hub, "hf_api", Api)

    def plain(*args: Any, **kwargs: Any) -> ModelCard:
        return ModelCard("---\nlibrary_name: transformers\ntags: [kept]\n---\n\n[More Information Needed]\n")

    monkeypatch.setattr(hub, "create_and_tag_model_card", plain)
    model = based_on(str(saved_base(tmp_path / "home")) if local else "org/base")
    assert model.push_to_hub("me/adapter") == "done"
    assert set(pushed) == {"README.md", CONFIG, "adapter_model.safetensors"}
    assert IMPORT in pushed["README.md"] and "kept" in pushed["README.md"] and "More Info" not in pushed["README.md"]
    settings = json.loads(pushed[CONFIG])
    assert not any(str(tmp_path) in content for content in pushed.values())
    base = settings["base_model_name_or_path"]
    assert base.startswith("a local base (Llama") if local else base == "org/base"
    assert checked_config("pushed", settings).base == (None if local else "org/base")
    folder = tmp_path / "fetched"
    folder.mkdir()
    for name, content in pushed.items():
        (folder / name).write_bytes(content.encode("latin-1"))
    again = PeftModel.from_pretrained(llama(), folder)
    with route([1, 0]):
        assert logits(again, tokens()).allclose(logits(model, tokens()))


def test_what_peft_says_without_the_import_is_in_the_card(tmp_path):
    save_adapter(based_on("org/base"), tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] in card_of(tmp_path)[1]
