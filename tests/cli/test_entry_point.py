"""How `alora` begins: what the environment says when torch is first looked for."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from alora_kernels.__main__ import SAID, SPINS, main

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
    assert seen_by_torch(*args) == "torch sees 1000"


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
