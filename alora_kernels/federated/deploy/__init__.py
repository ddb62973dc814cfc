"""Flower as processes: its simulation on this machine, a server and clients on real ones."""

from .runs import register, run_client, run_ray, run_status, start_superlink, submit_and_wait

__all__ = ["register", "run_client", "run_ray", "run_status", "start_superlink", "submit_and_wait"]
