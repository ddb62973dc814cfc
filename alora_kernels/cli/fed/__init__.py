"""`alora fed`: the commands, the participants a configuration speaks of, and studies of several methods."""

from .commands import app

__all__ = ["app"]
