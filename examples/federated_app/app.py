"""What Flower starts: the two apps, imported from what is installed on this machine."""

from alora_kernels.recipes.fed_apps import client as client
from alora_kernels.recipes.fed_apps import server as server

__all__ = ["client", "server"]  # Flower looks the names up here, without importing the file
