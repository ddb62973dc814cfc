"""How `alora` begins and fails: what the environment says when torch is first looked for, what is told in a line."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from alora_kernels.__main__ import SAID, SPINS, main
from alora_kernels.cli import command
from alora_kernels.ops.dispatch import BackendError

REPOSITORY = Path(__file__).parents[2]
BEGIN = f"""
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(f"torch sees {{os.environ.get({SPINS!r})}}", flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
from alora_kernels.__main__ import main
main()
"""


def seen_by_torch(*args: str, **said: str) -> str:
    """What a command prints until torch is first looked for."""
    env = {name: value for name, value in os.environ.items() if name not in SAID} | said
    done = subprocess.run([sys.executable, "-c", BEGIN, *args], capture_output=True, text=True, env=env, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("args", [("serve", "m", "--adapter", "a"), ("serve", "--adapter", "a", "m")])
def test_a_servers_idle_workers_sleep_soon(args):
    assert seen_by_torch(*args) == "torch sees 100000"


@pytest.mark.parametrize("args", [("doctor",), ("export", "serve")])
def test_other_commands_leave_the_environment_alone(args):
    assert seen_by_torch(*args) == "torch sees None"


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [(SPINS, "7", "7"), (SPINS, "", ""), ("OMP_WAIT_POLICY", "active", "None"), ("KMP_BLOCKTIME", "1", "None")],
)
def test_what_the_user_said_stands(name, value, seen):
    assert seen_by_torch("serve", "m", "--adapter", "a", **{name: value}) == f"torch sees {seen}".strip()


@pytest.mark.parametrize("args", [("--help",), ("serve", "--help"), ("train", "--help"), ("fed", "run", "--help")])
def test_help_does_not_look_for_torch(args):
    said = seen_by_torch(*args)
    assert "Usage" in said and "torch sees" not in said


def test_the_console_script_is_the_module():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(scripts["alora"]) is main


def test_a_backend_that_cannot_run_is_one_line_and_a_mistake_of_ours_a_traceback(capsys):
    with pytest.raises(typer.Exit) as stop, command():
        raise BackendError("take torch")
    assert stop.value.exit_code == 2 and capsys.readouterr().err == "error: take torch\n"
    with pytest.raises(RuntimeError, match="ours"), command():
        raise RuntimeError("ours")
    with pytest.raises(typer.Exit) as stop, command(), command():  # the inner one has said it
        raise ValueError("once")
    assert stop.value.exit_code == 2 and capsys.readouterr().err == "error: once\n"
