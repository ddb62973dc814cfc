"""Names that import their module when asked for."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alora_kernels._lazy import names_later


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a module that imports, one whose library is missing, and one with a mistake of its own."""
    folder = tmp_path / "late_names"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text("value = 7\n")
    (folder / "itself.py").write_text("")
    (folder / "missing.py").write_text("import no_such_library.part\n")
    (folder / "broken.py").write_text("import another_missing_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "late_names"
    for name in [name for name in sys.modules if name.partition(".")[0] == "late_names"]:
        del sys.modules[name]


def test_a_name_imports_its_module_when_asked_for(package: str) -> None:
    get = names_later(package, {"value": "good"})
    assert f"{package}.good" not in sys.modules
    assert get("value") == 7
    assert f"{package}.good" in sys.modules


def test_what_was_found_stays_in_the_package(package: str) -> None:
    assert names_later(package, {"value": "good"})("value") is sys.modules[package].value


def test_a_name_that_is_its_modules_own_is_the_module(package: str) -> None:
    found = names_later(package, {"itself": "itself"})("itself")
    assert found is sys.modules[f"{package}.itself"]


def test_a_name_nobody_defines_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match="module 'late_names' has no attribute 'other'"):
        names_later(package, {"value": "good"})("other")


def test_a_missing_library_names_the_remedy_and_other_mistakes_stay_what_they_are(package: str) -> None:
    get = names_later(
        package, {"a": "missing", "b": "broken"}, needs=["no_such_library"], remedy="pip install that library"
    )
    with pytest.raises(ImportError, match="pip install that library"):
        get("a")
    with pytest.raises(ModuleNotFoundError, match="another_missing_library"):
        get("b")


def test_every_public_name_is_there_after_the_plain_import() -> None:
    code = """
import sys, alora_kernels
assert "torch" not in sys.modules
import torch, types
assert isinstance(alora_kernels.reference, types.ModuleType) and alora_kernels.reference.alora_linear
assert alora_kernels.data.load_model and alora_kernels.training.TaskCollator and alora_kernels.serving.Engine
from alora_kernels.modules.linear import FusedALoRALinear
from alora_kernels.ops.functional import alora_delta, alora_linear
assert alora_kernels.FusedALoRALinear is FusedALoRALinear
assert (alora_kernels.alora_linear, alora_kernels.alora_delta) == (alora_linear, alora_delta)
names = {}
exec("from alora_kernels import *", names)
print(sorted(set(alora_kernels.__all__) - set(names)), sorted(set(dir(alora_kernels)) ^ set(alora_kernels.__all__)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] []"


def test_completion_shows_what_users_import():
    import alora_kernels

    assert {"ALoRAConfig", "ALoRATrainer", "set_task", "route"} <= set(dir(alora_kernels))
    assert "names_later" not in dir(alora_kernels)
