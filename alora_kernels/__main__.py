"""`python -m alora_kernels`: the same as `alora`."""

from .cli.app import app

app()
