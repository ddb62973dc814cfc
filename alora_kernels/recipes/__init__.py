"""Whole runs that join the branches: train a recipe, a federation, a study."""
