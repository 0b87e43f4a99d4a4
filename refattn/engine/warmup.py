"""The engine's entry points, compiled ahead of time into Numba's cache on disk.

A job is an entry point in one element type; kernels.py compiles it once for arrays of any strides, state/kernels.py and learner/kernels.py for arrays
in C order, so these are all there are.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import kernels
from .learner import kernels as learner_kernels
from .learner.run import COMPILED as LEARNERS
from .state import kernels as state_kernels

#: Entry points on one thread, by their names in tables: module and function.
ENTRIES = {
    **{way: (way, way) for way in ("forward", "decode", "rows", "backward")},
    "recurrent forward": ("state.recurrent", "forward_alone"),
    "recurrent backward": ("state.recurrent", "backward_alone"),
    "chunked forward": ("state.chunked", "forward_alone"),
    "chunked backward": ("state.chunked_backward", "backward_alone"),
    "quadratic forward": ("state.quadratic", "forward_alone"),
    "written first, forward": ("state.written_first", "forward_alone"),
    "written first, backward": ("state.written_first", "backward_alone"),
    **{f"{name} forward": (f"learner.{name}", "forward_alone") for name in LEARNERS},
}
ELEMENTS = ("float32", "float64")
#: By the first part of a module's name, unless it is kernels.py.
COMPILERS = {"state": state_kernels, "learner": learner_kernels}


@dataclass(frozen=True)
class Job:
    """One entry point in one element type.

    Attributes
    ----------
    way : str
        One of `ENTRIES`.
    element : {"float32", "float64"}
    parallel : bool
        For several threads.
    """

    way: str
    element: str
    parallel: bool

    def __str__(self) -> str:
        return f"{self.way}, {self.element}, {'several threads' if self.parallel else 'one thread'}"


JOBS = tuple(Job(*choice) for choice in itertools.product(ENTRIES, ELEMENTS, (False, True)))


def entry(job: Job) -> tuple[str, str]:
    """Module and function of a job."""
    module, function = ENTRIES[job.way]
    return module, function.removesuffix("_alone") + "_parallel" if job.parallel else function


def compiled(job: Job) -> Any:
    """The entry point, from the cache or compiled and put there."""
    module, function = entry(job)
    compiler = COMPILERS.get(module.partition(".")[0], kernels).kernel
    return compiler(getattr(importlib.import_module("." + module, __package__), function), np.dtype(job.element))


def cache_folder() -> Path:
    """Where Numba keeps what it compiled of the engine."""
    return Path(compiled(JOBS[0]).stats.cache_path)
