"""The house: imports go down, branches never import each other, no circles, nothing heavy or on a device at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "alora_kernels"
LAYERS = {
    "version": 0, "files": 0, "_lazy": 0, "_peft_hook": 0, "reference": 0, "routing": 0, "recompute": 0,
    "records": 0, "tensor_file": 0, "dtypes": 0, "precision": 0, "settings": 0, "text": 0, "plotting": 0,
    "kernels": 1, "ops": 2, "modules": 3, "tuner": 4, "adapters": 5,
    "training": 6, "data": 6, "baselines": 6, "serving": 6, "federated": 6, "analysis": 6, "tuning": 6,
    "integrations": 7, "recipes": 7, "cli": 8, "__main__": 9, "__init__": 9,
}  # fmt: skip


def modules(top: Path) -> dict[str, Path]:
    """Dotted name -> file of all Python files below a folder of the repository."""
    found = {}
    for file in top.rglob("*.py"):
        parts = file.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(name: str, file: Path) -> set[str]:
    """Dotted names of everything a file imports, relative imports resolved."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_files(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules among `known` that a file imports: a module, or a name that a module defines."""
    targets = imported(name, file)
    return {n if n in known else n.rpartition(".")[0] for n in targets} & set(known) - {name}


def rooms(name: str, file: Path) -> set[str]:
    """First component below the package of everything a file imports from it."""
    return {n.split(".")[1] for n in imported(name, file) if n.startswith("alora_kernels.")}


LIBRARY = modules(PACKAGE)


def test_imports_go_down_and_branches_stay_apart():
    wrong = []
    for name, file in LIBRARY.items():
        room = name.split(".")[1] if "." in name else "__init__"
        for target in rooms(name, file) - {room}:
            if target not in LAYERS or LAYERS[target] == LAYERS[room] == 0:
                continue  # a name of the package's own __init__; the ground floor is one room
            if LAYERS[target] >= LAYERS[room]:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_files_form_no_circle():
    graph = {name: imported_files(name, file, LIBRARY) for name, file in LIBRARY.items() if file.name != "__init__.py"}
    try:
        TopologicalSorter({n: {t for t in ts if t in graph} for n, ts in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("top", ["bench", "examples"])
def test_benchmarks_and_examples_stand_on_recipes_not_on_the_command_line(top):
    wrong = [name for name, file in modules(REPOSITORY / top).items() if "cli" in rooms(name, file)]
    assert not wrong


def test_every_room_has_a_layer():
    found = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found == set(LAYERS)


def test_the_layering_tests_can_fail():
    assert rooms("alora_kernels.training.trainer", LIBRARY["alora_kernels.training.trainer"]) >= {"routing"}
    name = "alora_kernels.ops.triton_backend"
    assert "alora_kernels.ops.types" in imported_files(name, LIBRARY[name], LIBRARY)
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_import_touches_no_device_and_nothing_heavy():
    code = (
        "import sys, torch; seen=[]; torch.cuda.get_device_properties=lambda *a: seen.append(1);"
        "from alora_kernels import FusedALoRALinear, alora_delta, alora_linear, keep_routing, reference, route;"
        "assert not seen and not torch.cuda.is_initialized();"
        "heavy={'peft','transformers','datasets','flwr','fastapi','triton'} & set(sys.modules); print(sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("module", ["alora_kernels", "alora_kernels.cli.app", "alora_kernels.__main__"])
def test_what_answers_at_once_loads_no_library_that_takes_seconds(module):
    slow = ("torch", "numpy", "pandas", "transformers", "peft", "datasets", "safetensors", "flwr", "matplotlib")
    code = f"import sys, {module}; print(sorted(set({slow}) & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("module", ["alora_kernels.cli.app", "alora_kernels.recipes.federated", "bench.gpu"])
def test_a_command_begins_in_silence(module):
    """bitsandbytes says at its import that no package of CPU kernels is there; it would stand before every result."""
    pytest.importorskip("bitsandbytes")
    code = f"import {module}, bitsandbytes"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "Failed to load" not in out.stdout + out.stderr
