"""The command line; `app` holds the commands, recipes do the work."""

from .. import recipes as recipes  # first of all: it keeps bitsandbytes quiet
