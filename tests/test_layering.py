"""The house: imports go down only, applications never import each other, nothing heavy or on a device at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "alora_kernels"
LAYERS = {
    "version": 0, "atomic": 0, "later": 0, "reference": 0, "baselines": 0, "routing": 0, "recompute": 0, "settings": 0,
    "kernels": 1, "ops": 2, "modules": 3, "integrations": 4,
    "training": 5, "data": 5, "federated": 5, "serving": 5, "analysis": 5,
    "cli": 6, "__main__": 7, "__init__": 7,
}  # fmt: skip


def imported_rooms(file: Path) -> set[str]:
    """First component below `alora_kernels` of everything a file imports from the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    package = ["alora_kernels", *parts[:-1]]
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *((node.module or "").split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("alora_kernels.")}
    return rooms


def test_imports_go_down_and_applications_stay_apart():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).parts
        room = parts[0].removesuffix(".py")
        for target in imported_rooms(file) - {room}:
            if target not in LAYERS:
                continue  # a name of the package's own __init__
            if LAYERS[target] >= LAYERS[room]:
                if LAYERS[room] == LAYERS[target] == 0:
                    continue  # the ground floor is one room
                wrong.append(f"{file.relative_to(PACKAGE)} imports {target}")
    assert not wrong


def test_every_room_has_a_layer():
    rooms = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms <= set(LAYERS)


def test_the_layering_test_can_fail(tmp_path):
    assert imported_rooms(PACKAGE / "training" / "trainer.py") >= {"routing"}
    assert imported_rooms(PACKAGE / "ops" / "triton_backend.py") >= {"kernels"}


def test_import_touches_no_device_and_nothing_heavy():
    code = (
        "import sys, torch; seen=[]; torch.cuda.get_device_properties=lambda *a: seen.append(1);"
        "import alora_kernels; assert not seen and not torch.cuda.is_initialized();"
        "heavy={'peft','transformers','datasets','flwr','fastapi','triton'} & set(sys.modules); print(sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
