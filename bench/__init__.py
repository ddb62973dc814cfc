"""Benchmarks: `python -m bench --help`, and README.md here."""

from alora_kernels import recipes as recipes  # first of all: it keeps bitsandbytes quiet
