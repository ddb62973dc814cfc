"""README.md of a saved adapter: what it is, how it is loaded, its tasks; no path of the machine that wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..text import listed

IMPORT = "import alora_kernels"
MARK = "<!-- Written by alora_kernels, and again with the adapter. Without this line the text is yours and stays. -->"
SKELETON = "[More Information Needed]"  # PEFT's and transformers' template
LOCAL = "a local base"
CLASSES = {"CAUSAL_LM": "ForCausalLM", "SEQ_2_SEQ_LM": "ForSeq2SeqLM", "SEQ_CLS": "ForSequenceClassification",
           "TOKEN_CLS": "ForTokenClassification", "QUESTION_ANS": "ForQuestionAnswering"}  # fmt: skip
ABOUT = """
# ALoRA adapter: {names}

An asymmetric LoRA (ALoRA) adapter for {base}: in every adapted layer {matrices}, and one B for all of them.
Rank {r}, lora_alpha {alpha}, PEFT type `ASYMLORA`. It has nothing to do with Activated LoRA, which PEFT calls aLoRA.
"""
LOADING = """
## Loading

PEFT can load it after an import; without it, it knows no such type (`KeyError: 'ASYMLORA'`):

```python
{imported}  # registers the adapter type
from peft import PeftModel
{base}
model = PeftModel.from_pretrained(base, "path/or/hub-id/of/this/adapter")
{call}
```
"""
ASKING = """
## Asking

`adapter_tasks.json` holds how each task is asked; these put what you say into it:

```bash
alora generate path/of/this/adapter --task {task} "some text"
alora serve {model} --adapter path/of/this/adapter
```

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
turns = [{{"role": "user", "content": "some text"}}]
print(client.chat.completions.create(model="{task}", messages=turns).choices[0].message.content)
```
"""
_CACHED = re.compile(r"models--(.+?)[/\\]snapshots[/\\]")
_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")


def hub_id(base: Any) -> str | None:
    """What others find a base under; None for a folder of this machine, also if it is gone, and for nothing."""
    if not isinstance(base, str):
        return None
    if cached := _CACHED.search(base):
        return cached[1].replace("--", "/")
    return base if _ID.fullmatch(base) and not Path(base).exists() else None


def told(base: str | None) -> str:
    """A base as others may know it: its hub id, or by what its config says one would recognise it."""
    if base is None or hub_id(base):
        return hub_id(base) or "a base that it does not name"
    try:
        config = json.loads(Path(base, "config.json").read_text(encoding="utf-8"))
        (kind, *_), layers = config["architectures"], config["num_hidden_layers"]
        return f"{LOCAL} ({kind}, {layers} layers of width {config['hidden_size']}, {config['vocab_size']} tokens)"
    except (OSError, ValueError, KeyError, TypeError):
        return LOCAL


def model_card(
    config: Any, old: str = "", *, named: str | None = None, asked: Mapping[str, str] = {}, more: str = ""
) -> str:
    """The card for a config; of an older one metadata stay, and the text if somebody wrote it.

    `named` is a base of `alora_kernels.data.load_model`; `asked` says what tasks answer; `more` ends the card.
    """
    card: Any = ModelCard(old or "---\n{}\n---\n", ignore_metadata_errors=True)
    data, base, loading = card.data, hub_id(config.base_model_name_or_path), _loading(config, named)
    own = isinstance(data.get("base_model"), list) or hub_id(data.get("base_model"))
    data.library_name, data.base_model = "peft", base or (data.get("base_model") if own else None)
    tags = {tag for tag in data.get("tags") or () if not tag.startswith("base_model:")}
    data.tags = sorted(tags | {"asymlora", "multi-task"} | ({f"base_model:adapter:{base}"} if base else set()))
    if old and MARK not in old and SKELETON not in old:
        card.text = card.text if IMPORT in old else f"{card.text.rstrip()}\n{loading}"
        return str(card)
    matrices, names = "one A per task", listed(config.tasks or (), 4)
    if not config.tasks:
        names, matrices = "soft routing", f"{config.experts} A, which a learned router weighs for each token"
    about = {"base": f"`{named}`" if named else told(config.base_model_name_or_path), "matrices": matrices}
    text = ABOUT.format(names=names, r=config.r, alpha=config.lora_alpha, **about) + loading
    if config.tasks:
        text += "\n## Tasks\n\nA task answers well the prompts that it was trained on; the answer follows them.\n\n"
        text += "".join(f"- `{task}`{f': `{asked[task]}`' if task in asked else ''}\n" for task in config.tasks)
        if known := next((task for task in config.tasks if task in asked), None):
            text += ASKING.format(
                task=known, model=named or hub_id(config.base_model_name_or_path) or "path/of/the/base"
            )
    card.text = f"\n{MARK}\n{text}{more}"
    return str(card)


def _loading(config: Any, named: str | None) -> str:
    base, kind = hub_id(config.base_model_name_or_path), f"AutoModel{CLASSES.get(config.task_type or '', '')}"
    lines = f'from transformers import {kind}\n\nbase = {kind}.from_pretrained("{base}")'
    if named:
        lines = f'from alora_kernels.data import load_model\n\nbase, tokenizer = load_model("{named}")'
    elif base is None:
        lines = f"\nbase = ...  # {told(config.base_model_name_or_path)}"
    call = "model(**batch)  # a router weighs the experts: there is no task to choose"
    if config.tasks:
        call = f'model(**batch, adapter_names=[{json.dumps(config.tasks[0])}, "__base__"])  # one for each row'
    return LOADING.format(imported=IMPORT, base=lines, call=call)
