"""`alora`, also as `python -m alora_kernels`: what must be set before torch is loaded, then the command line."""

import os
import sys

SPINS = "GOMP_SPINCOUNT"
SAID = (SPINS, "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # how users say how long idle workers spin


def wait_patiently() -> None:
    """Idle workers of a product sleep after 100,000 turns, 5 ms, unless the user has said how long they spin.

    GNU's OpenMP reads the variable when torch loads it. By default they spin three times as long, and beside busy
    neighbours every product of a server waits that long until `serving.openmp` notices; after 1000 turns they would
    sleep between two products, which then take half as long again.
    """
    if not any(name in os.environ for name in SAID):
        os.environ[SPINS] = "100000"


def main() -> None:
    """The console script."""
    if sys.argv[1:2] == ["serve"]:
        wait_patiently()
    from .cli.app import app

    app()


if __name__ == "__main__":
    main()
