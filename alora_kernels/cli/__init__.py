"""The command line; `app` holds the commands, recipes do the work."""

import logging

# bitsandbytes looks for CPU kernels on a hub when something imports it, and says so before a command has begun
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
