"""Layers: thin modules around the ops."""

from .linear import FusedALoRALinear

__all__ = ["FusedALoRALinear"]
