"""One server and three clients behind TLS, each as on a machine of its own: `python examples/federated_loopback.py`.

Here all four share one machine and talk over 127.0.0.1. The comments give the commands for real machines: run each on
the machine it names, with the server's name for 127.0.0.1. Only .pub files, `ca.pem` and low-rank matrices ever travel.
"""

import argparse
from pathlib import Path

import rich

from alora_kernels.federated import FedConfig, deploy
from alora_kernels.federated.log import read
from alora_kernels.federated.view import summary

HERE, TASKS = "127.0.0.1", ("movie", "amazon", "nyt")


def main(output: str = "runs/fed-loopback", model: str = "minilm", **settings: int) -> list[dict]:
    """Run it, print the table, and return the server's ledger."""
    folder, port = Path(output).resolve(), deploy.free_port()
    clients = [{"name": task, "task": task} for task in TASKS]
    run = {"method": "fed-alora", "clients": clients, "model": model, "rounds": 3, "output": folder / "run"}
    config = FedConfig.from_values(run | {"guard": {"quorum": 3}} | settings)  # round 1 waits for all three

    # once, on the server: alora fed certificates tls --host fed.example.org       (every client gets tls/ca.pem)
    certificates = deploy.make_certificates(folder / "tls", [HERE])
    # once, on each client: alora fed key movie                                    (the server gets movie.pub)
    keys = {task: deploy.make_node_key(folder / task, task) for task in TASKS}

    with deploy.Processes(folder / "logs") as processes:
        # on the server: alora fed server run.yaml --certificates tls --key movie.pub --key amazon.pub --key nyt.pub
        server = folder / "server"
        deploy.start_superlink(processes, server, host=HERE, port=port, certificates=certificates)
        for task, (_, public) in keys.items():
            deploy.register(server, public, task)

        # on each client: alora fed client run.yaml movie --server fed.example.org:8000 --ca ca.pem --key movie
        for task, (private, _) in keys.items():
            address, state = f"{HERE}:{port}", folder / task / "state"
            command = deploy.supernode_command(task, address, ca=certificates.ca, key=private, state_dir=state)
            processes.start(task, command, deploy.environment(folder / task))

        # part of `alora fed server`: the run begins when enough clients are connected
        deploy.submit_and_wait(server, deploy.write_app(folder / "app", config.to_yaml()), echo=print)
    events = read(config.output / "ledger.jsonl")
    rich.print(summary(events))
    return events


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/fed-loopback", help="a folder that does not exist yet")
    parser.add_argument("--model", default="minilm")
    main(**vars(parser.parse_args()))
