"""The engine's entry points, compiled ahead of time into Numba's cache on disk.

A job is an entry point in one element type; kernels.py compiles it once for arrays of any strides, so these are all there are.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .kernels import kernel

WAYS = ("forward", "decode", "rows", "backward")
ELEMENTS = ("float32", "float64")


@dataclass(frozen=True)
class Job:
    """One entry point in one element type.

    Attributes
    ----------
    way : {"forward", "decode", "rows", "backward"}
        Its module.
    element : {"float32", "float64"}
    parallel : bool
        For several threads.
    """

    way: str
    element: str
    parallel: bool

    def __str__(self) -> str:
        return f"{self.way}, {self.element}, {'several threads' if self.parallel else 'one thread'}"


JOBS = tuple(Job(*choice) for choice in itertools.product(WAYS, ELEMENTS, (False, True)))


def compiled(job: Job) -> Any:
    """The entry point, from the cache or compiled and put there."""
    module = importlib.import_module(f".{job.way}", __package__)
    return kernel(getattr(module, job.way + "_parallel" * job.parallel), np.dtype(job.element))


def cache_folder() -> Path:
    """Where Numba keeps what it compiled of the engine."""
    return Path(compiled(JOBS[0]).stats.cache_path)
