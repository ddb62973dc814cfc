"""Adapter folders: the one reader and writer, and LoRA folders in and out."""
