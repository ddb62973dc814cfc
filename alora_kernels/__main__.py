"""`alora`, also as `python -m alora_kernels`: what must be set before torch is loaded, then the command line."""

import os
import sys

SPINS = "GOMP_SPINCOUNT"
SAID = (SPINS, "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # how users say how long idle workers spin


def wait_patiently() -> None:
    """Idle workers of a product sleep after 50 us (1000 turns), unless the user has said how long they spin.

    GNU's OpenMP reads the variable when torch loads it. By default they spin for 300,000 turns, 15 ms, and beside busy
    neighbours every product of a server waits that long.
    """
    if not any(name in os.environ for name in SAID):
        os.environ[SPINS] = "1000"


def main() -> None:
    """The console script."""
    if sys.argv[1:2] == ["serve"]:
        wait_patiently()
    from .cli.app import app

    app()


if __name__ == "__main__":
    main()
