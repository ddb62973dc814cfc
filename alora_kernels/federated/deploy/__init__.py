"""Flower as processes: its simulation on this machine, a server and clients on real ones."""

from typing import TYPE_CHECKING

from ..._lazy import names_later

if TYPE_CHECKING:
    from .runs import register, run_client, run_ray, run_status, start_superlink, submit_and_wait

__all__ = ["register", "run_client", "run_ray", "run_status", "start_superlink", "submit_and_wait"]

__getattr__ = names_later(__name__, dict.fromkeys(__all__, "runs"))
