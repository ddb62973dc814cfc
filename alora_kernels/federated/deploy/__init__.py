"""Flower as processes: its simulation on this machine, a server and clients on real ones.

app          the folder that `flwr run` submits
keys         certificates and node keys
commands     SuperLink and SuperNode, and the environment they run in
superlink    Flower's server with its control interface closed to other machines
processes    start, watch and stop
runs         register, submit, follow, judge by status
"""

from .runs import register, register_once, run_client, run_ray, run_status, start_superlink, submit_and_wait

__all__ = [
    "register",
    "register_once",
    "run_client",
    "run_ray",
    "run_status",
    "start_superlink",
    "submit_and_wait",
]
