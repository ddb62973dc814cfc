"""The op in plain torch."""
