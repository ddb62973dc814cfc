"""`python -m alora_kernels.cli`, which `torchrun -m` takes, as does `-m alora_kernels`."""

from .app import app

if __name__ == "__main__":
    app()
