"""Flower as processes: its simulation on this machine, a server and clients on real ones."""

from typing import TYPE_CHECKING

from ..._lazy import names_later
from .. import REMEDY

if TYPE_CHECKING:
    from .apps import write_app
    from .commands import Certificates, environment, make_certificates, make_node_key, supernode_command
    from .processes import FlowerError, Processes, free_port
    from .runs import AlreadyRegisteredError, register, run_client, run_ray, start_superlink, submit_and_wait

_NAMES = {
    "apps": ("write_app",),
    "commands": ("Certificates", "environment", "make_certificates", "make_node_key", "supernode_command"),
    "processes": ("FlowerError", "Processes", "free_port"),
    "runs": ("AlreadyRegisteredError", "register", "run_client", "run_ray", "start_superlink", "submit_and_wait"),
}

__all__ = [
    "AlreadyRegisteredError", "Certificates", "FlowerError", "Processes", "environment", "free_port",
    "make_certificates", "make_node_key", "register", "run_client", "run_ray", "start_superlink", "submit_and_wait",
    "supernode_command", "write_app",
]  # fmt: skip

_WHERE = {name: module for module, names in _NAMES.items() for name in names}
__getattr__ = names_later(__name__, _WHERE, needs=("flwr", "cryptography", "psutil"), remedy=REMEDY)
