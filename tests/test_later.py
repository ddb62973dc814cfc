"""Names that import their module when asked for."""

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


def test_completion_shows_what_users_import():
    import alora_kernels

    assert {"ALoRAConfig", "ALoRATrainer", "set_task", "route"} <= set(dir(alora_kernels))
    assert "names_later" not in dir(alora_kernels)
