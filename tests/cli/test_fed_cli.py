"""`alora fed`: runs on a tiny random encoder, and how it fails."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from alora_kernels.cli.app import app
from alora_kernels.federated.config import load_config
from alora_kernels.federated.log import read

from ..support.cli import invoke
from ..support.toyrows import letters

alora = partial(invoke, app, "fed")
refused = partial(invoke, app, "fed", code=2)


def arrays(folder: Path) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in load_file(folder / "final.safetensors").items()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two clients with files of their own."""
    draw = random.Random(0)
    for name in ("ann", "bob"):
        letters(tmp_path / f"{name}.jsonl", 80, ("0", "1"), draw)
    path = tmp_path / "fed.yaml"
    path.write_text(
        f"method: fed-alora\nclients: {{ann: {{task: {tmp_path}/ann.jsonl}}, bob: {{task: {tmp_path}/bob.jsonl}}}}\n"
        f"model: tiny-random-encoder\nrounds: 2\nrank: 2\nlocal_steps: 2\nbatch_size: 4\ntest_size: 16\n"
        f"output: {tmp_path}/out\n"
    )
    return path


def test_a_run_its_folder_and_its_table(config, tmp_path):
    said = alora("run", config)
    assert "fed-alora" in said and "ann" in said and "bob" in said and "finished" in said
    out = tmp_path / "out"
    assert {"ledger.jsonl", "server.safetensors", "final.safetensors", "rounds.png", "clients"} <= {
        p.name for p in out.iterdir()
    }
    [adapter] = out.glob("clients/*/ann/adapter")
    assert (adapter / "adapter_model.safetensors").exists()
    assert read(out / "ledger.jsonl")[-1]["status"] == "finished"
    assert "ann" in alora("show", out)
    assert "ann" in alora("show", out, "--follow")  # ends at once: the run has ended


def rounds_shown(said: str) -> list[str]:
    return re.findall(r"round (\d)/\d", said)


def test_an_earlier_run_is_neither_shown_as_new_nor_replaced_by_accident(config, tmp_path):
    out = tmp_path / "out"
    assert rounds_shown(alora("run", config)) == ["1", "2"]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for engine in ("inprocess", "ray"):
        said = refused("run", config, "--engine", engine)
        assert "--overwrite" in said and "--resume" in said and str(out) in said.replace("\n", "")
        assert rounds_shown(said) == []
    said = refused("server", config, "--certificates", tmp_path)
    assert "--overwrite" in said and rounds_shown(said) == []
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert "give one of them" in refused("run", config, "--resume", "--overwrite")

    whole, old = arrays(out), [e["run"] for e in read(out / "ledger.jsonl") if e["event"] == "run"]
    assert rounds_shown(alora("run", config, "--overwrite")) == ["1", "2"]
    assert arrays(out) == whole
    (new,) = [e["run"] for e in read(out / "ledger.jsonl") if e["event"] == "run"]
    assert [new] != old and [p.name for p in (out / "clients").iterdir()] == [new]

    config.write_text(config.read_text().replace("rounds: 2", "rounds: 3"))
    assert rounds_shown(alora("run", config, "--resume")) == ["3"]
    events = read(out / "ledger.jsonl")
    assert [e["round"] for e in events if e["event"] == "round" and e["kind"] == "train"] == [1, 2, 3]
    alora("run", config, "--output", tmp_path / "elsewhere")


def test_the_papers_configuration_reads():
    path = Path(__file__).parents[2] / "examples" / "paper" / "fed-flan.yaml"
    found = load_config(path)
    assert (found.method, len(found.clients), found.rounds, found.rank, found.lora_alpha) == ("fed-alora", 5, 11, 8, 16)
    assert (found.local_steps, found.batch_size, found.learning_rate) == (47, 64, 5e-4)
    assert path.read_text().startswith("# git clone https://github.com/")


def test_methods_lists_them_all():
    said = alora("methods")
    for method in ("fedit", "ffa-lora", "fedsa-lora", "fedsa-rslora", "fedsa-vera", "fed-alora-het", "local"):
        assert method in said


def test_keys_and_certificates(tmp_path):
    assert "ca.pem" in alora("certificates", tmp_path / "tls", "--host", "127.0.0.1")
    said = alora("key", "ann", "--folder", tmp_path / "keys")
    private = next(p for p in (tmp_path / "keys").iterdir() if p.suffix != ".pub")
    assert private.stat().st_mode & 0o077 == 0 and "ann.pub" in said
    assert "refused" in (again := refused("key", "ann", "--folder", tmp_path / "keys")) or "exist" in again


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "none.yaml"], "cannot read none.yaml"),
        (["show", "nowhere"], "has no ledger.jsonl"),
        (["client", "none.yaml", "ann", "--server", "h:1", "--ca", "no.pem", "--key", "no"], "cannot read none.yaml"),
        (["key", "../x"], "client must be"),
    ],
)
def test_mistakes_are_one_line(args, says):
    assert says in refused(*args)


def test_what_does_not_fit_the_configuration_is_one_line(config, tmp_path):
    args = ["client", str(config), "ann", "--server", "h:1", "--ca", str(tmp_path / "no.pem"), "--key", "no"]
    assert "no.pem is missing" in refused(*args)
    assert "no client 'eve'; the configuration has ann, bob" in refused(*(a if a != "ann" else "eve" for a in args))
    assert "inprocess or ray" in refused("run", config, "--engine", "dask")
    assert "certificates" in refused("server", config, "--certificates", tmp_path / "none")


def test_a_run_that_stops_says_how_to_go_on(config, tmp_path):
    (tmp_path / "bob.jsonl").write_text("")
    config.write_text(config.read_text() + "guard: {quorum: 2, patience: 1}\n")
    said = refused("run", config)
    assert "without a quorum" in said and "--resume" in said


KILLED = """
import os, signal, sys
from alora_kernels.cli.app import app
from alora_kernels.federated.client import Client
train, calls = Client.train, []
def fourth(self, message):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(self, message)
Client.train = fourth
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_resumes_to_the_same_arrays(config, tmp_path):
    """SIGKILL, which nobody can handle, in the second round."""
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 6"))
    alora("run", config, "--output", tmp_path / "whole")
    ledger = tmp_path / "out" / "ledger.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, "fed", "run", str(config)], capture_output=True)
    assert done.returncode == -signal.SIGKILL and '"event": "round"' in ledger.read_text()
    assert not (tmp_path / "out" / "final.safetensors").exists()
    alora("run", config, "--resume")
    assert arrays(tmp_path / "out") == arrays(tmp_path / "whole")


def test_without_flower_the_error_names_the_extra():
    code = "import sys; sys.modules['flwr'] = None\nfrom alora_kernels.cli.app import app\napp(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "fed", "run", "x.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -e '.[federated]'" in done.stderr and "Traceback" not in done.stderr
    methods = subprocess.run([sys.executable, "-c", code, "fed", "methods"], capture_output=True, text=True)
    assert methods.returncode == 0 and "fed-alora" in methods.stdout  # data needs no Flower
