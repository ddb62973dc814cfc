"""Fitting the layer into other libraries: one subpackage per library, imported only when that library is used."""
