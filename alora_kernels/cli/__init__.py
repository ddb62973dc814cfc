"""The command line and the recipes behind it; `app` holds the commands."""

import logging

# bitsandbytes looks for CPU kernels on a hub when something imports it, and says so before a command has begun
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
