"""Whole runs that join the branches: train a recipe, a federation, a study."""

import logging

# bitsandbytes looks for CPU kernels on a hub when something imports it, and says so before a run has begun
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
