"""`alora fed`: federated fine-tuning from a YAML configuration, on one machine or on many."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .. import federated
from ..federated import deploy
from ..recipes import display
from . import command

app = typer.Typer(no_args_is_help=True, help="Fine-tune together without sharing data (Flower).")

Config = Annotated[Path, typer.Argument(help="YAML file, see examples/federated.yaml")]
Output = Annotated[Path | None, typer.Option(help="folder of the run, instead of the configuration's")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in the output folder")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in the output folder")]


@app.command()
def methods() -> None:
    """What each method shares, what stays with the client, and how much travels."""
    with command():
        rows = []
        for spec in federated.METHODS.values():
            private = [*(role for role in spec.living("private") if role != "head"), "head"]
            shared = ", ".join(spec.living("shared")) or "-"
            rows.append([spec.name, shared, ", ".join(private), spec.aggregation, spec.cost])
        columns = ["method", "shared", "private", "the server computes", "floats up and down"]
        said = "floats per adapted layer (K in, N out, rank r), client and round; d_m is the rank of the shared space"
        display.console.print(display.table("federated methods", columns, rows, said, left=len(columns)))


@app.command()
def run(
    config: Config,
    engine: Annotated[str, typer.Option(help="inprocess: one client after the other; ray: Flower's simulation")] = (
        "inprocess"
    ),
    resume: Resume = False,
    overwrite: Overwrite = False,
    output: Output = None,
) -> None:
    """Run server and all clients on this machine."""
    with _federated():
        if engine not in ("inprocess", "ray"):
            raise ValueError(f"--engine is inprocess or ray, got {engine!r}")
        settings = _claimed(config, output, resume, overwrite)
        home = settings.output / "flower"
        with _table(settings):
            if engine == "ray":
                app = deploy.write_app(home / "app", settings.to_yaml(), resume=resume)
                deploy.run_ray(app, len(settings.clients), home)
            else:
                from ..recipes.federated import participant

                outcome = federated.run(settings, partial(participant, settings), resume=resume)
                if outcome.status != "finished":
                    raise ValueError(f"stopped after round {outcome.rounds}: {outcome.reason}; go on with --resume")
        _report(settings.output)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="folder of a run, finished or still running")],
    follow: Annotated[bool, typer.Option(help="stay until the run ends")] = False,
) -> None:
    """The table and the plot of a run, from its ledger."""
    with _federated():
        ledger = folder / federated.log.LEDGER
        if not ledger.exists():
            raise ValueError(f"{folder} has no {ledger.name}: give the output folder of a federated run")
        if follow:
            federated.view.watch(ledger)
        _report(folder)


@app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(help="where to write ca.pem and the server's certificate and key")],
    host: Annotated[list[str] | None, typer.Option(help="name or address that clients will use; repeatable")] = None,
) -> None:
    """Make a certificate authority and a server certificate, unless your organisation has its own."""
    with _federated():
        made = deploy.make_certificates(folder, host or ())
        typer.echo(f"server: keep {made.certificate} and {made.key}; every client needs a copy of {made.ca}")


@app.command()
def key(
    client: Annotated[str, typer.Argument(help="name of the client, as in the configuration")],
    folder: Annotated[Path, typer.Option(help="where to write the pair")] = Path("."),
) -> None:
    """Make a client's key pair; its public half goes to the server, its private half never leaves."""
    with _federated():
        private, public = deploy.make_node_key(folder, client)
        typer.echo(f"send {public} to the server's operator; keep {private}")


@app.command()
def server(
    config: Config,
    certificates: Annotated[Path, typer.Option(help="folder made by `alora fed certificates`")],
    key: Annotated[list[Path] | None, typer.Option(help="public key of a client, NAME.pub; repeatable")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="TCP port for the clients")] = 8000,
    resume: Resume = False,
    overwrite: Overwrite = False,
    output: Output = None,
) -> None:
    """Serve a run to clients on other machines: TLS, and only registered keys."""
    with _federated():
        settings = _claimed(config, output, resume, overwrite)
        home = settings.output / "flower"
        with deploy.Processes(home / "logs") as processes, _table(settings):
            files = deploy.Certificates(certificates)
            deploy.start_superlink(processes, home, host=host, port=port, certificates=files)
            for public in key or []:
                with suppress(deploy.AlreadyRegisteredError):  # an earlier start of this server took it in
                    deploy.register(home, public, public.name.removesuffix(".pub"))
            deploy.submit_and_wait(home, deploy.write_app(home / "app", settings.to_yaml(), resume=resume))
        _report(settings.output)


@app.command()
def client(
    config: Annotated[Path, typer.Argument(help="this client's own copy of the configuration: what it shares")],
    name: Annotated[str, typer.Argument(help="this client, as the configuration calls it")],
    server: Annotated[str, typer.Option(help="host:port of the server")],
    ca: Annotated[Path, typer.Option(help="the server's ca.pem")],
    key: Annotated[Path, typer.Option(help="this client's private key")],
    state_dir: Annotated[Path, typer.Option(help="keeps the private half between rounds")] = Path("state"),
    data: Annotated[Path | None, typer.Option(help=".jsonl with `prompt` and `answer`; never leaves")] = None,
) -> None:
    """Take part in a run as one client; stays until stopped, and may be restarted at any time."""
    with _federated():
        federated.load_config(config).client(name)
        supernode = deploy.supernode_command(
            name, server, ca=ca, key=key, state_dir=state_dir, config=config, data=data
        )
        deploy.run_client(name, supernode, state_dir, echo=typer.echo)


def _claimed(config: Path, output: Path | None, resume: bool, overwrite: bool) -> federated.FedConfig:
    """The configuration, with an output folder that means the same in every process and is free for the run.

    Before anything is shown or started: it holds no run, or it was said what becomes of that.
    """
    settings = federated.load_config(config)
    settings = settings.model_copy(update={"output": (output or settings.output).resolve()})
    if resume and overwrite:
        raise ValueError("--resume goes on with the run in the folder, --overwrite replaces it: give one of them")
    if overwrite:
        federated.server.clear(settings.output)
    elif not resume:
        federated.server.check_fresh(settings.output)
    return settings


@contextmanager
def _table(settings: federated.FedConfig) -> Iterator[None]:
    """The live table beside a run: a thread that reads the ledger, whichever process writes it."""
    done, now = threading.Event(), datetime.now(UTC)
    since = now.replace(microsecond=now.microsecond // 1000 * 1000)  # a ledger's times are cut to milliseconds
    ledger, how = settings.output / federated.log.LEDGER, {"until": done.is_set, "console": display.err, "since": since}
    thread = threading.Thread(target=federated.view.watch, args=(ledger,), kwargs=how, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def _report(folder: Path) -> None:
    """The table of a run, and the plot beside its ledger."""
    events = federated.log.read(folder / federated.log.LEDGER)
    display.console.print(federated.view.summary(events))
    try:
        federated.view.plot(events, folder / federated.server.PLOT)
    except ImportError as error:
        typer.echo(f"no plot: {error}", err=True)
    typer.echo(f"everything is in {folder}")


@contextmanager
def _federated() -> Iterator[None]:
    """As `command`, for Flower's errors too."""
    with command(), command(deploy.FlowerError):
        yield
