"""What Flower starts: the two apps, imported from what is installed on this machine."""

from alora_kernels.recipes.federated import client as client
from alora_kernels.recipes.federated import server as server

__all__ = ["client", "server"]  # Flower looks the names up here, without importing the file
