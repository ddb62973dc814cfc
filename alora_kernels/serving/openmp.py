"""Ends the OpenMP workers of a thread that loaded a model or an adapter and is done computing.

Every thread that ever ran a parallel product in torch keeps workers of its own. GNU's OpenMP lets idle workers spin for
a moment, so that the next product finds them awake; with more workers in the process than cores they sleep at once, and
every product begins by waking them. The generation thread is then slowed by workers that nobody uses: a decode step of
SmolLM2 with 16 tasks takes 190 to 210 ms instead of 135 to 175 (two cores, LOG.md).
"""

from __future__ import annotations

import functools

import threadpoolctl
import torch  # noqa: F401  # its OpenMP library must be loaded before it is looked for

SOFT = 1  # omp_pause_soft: keep settings


@functools.cache
def _gnu_libraries() -> tuple[threadpoolctl.LibController, ...]:
    """GNU's OpenMP libraries in this process: none on macOS, with Intel's OpenMP, or before OpenMP 5."""
    found = threadpoolctl.ThreadpoolController().select(prefix="libgomp").lib_controllers
    return tuple(library for library in found if hasattr(library.dynlib, "omp_pause_resource_all"))


def release_workers() -> bool:
    """End the calling thread's workers, until its next parallel product; False if there is no GNU OpenMP."""
    libraries = _gnu_libraries()
    for library in libraries:
        library.dynlib.omp_pause_resource_all(SOFT)
    return bool(libraries)
