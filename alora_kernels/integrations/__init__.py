"""Fitting the layer into other libraries, and adapters into their formats; imported only when used."""
