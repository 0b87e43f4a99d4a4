"""Every benchmark can be set up and run, and none of the catalogue's variants is missing."""

import importlib
import inspect
import itertools
import math
import pkgutil
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from refattn import catalog

pytestmark = pytest.mark.compiled

ROOT = Path(__file__).parents[1]
MODULES = [info.name for info in pkgutil.iter_modules([str(ROOT / "benchmarks")]) if info.name.startswith("bench_")]
KINDS = ("time_", "timeraw_", "peakmem_", "track_")


def benchmarks(module):
    """Every (class, method name) that asv would find."""
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    return [(c, name) for c in classes for name in dir(c) if name.startswith(KINDS)]


def smallest(cls):
    """Every variant, at the first value of everything else."""
    values = zip(getattr(cls, "params", ()), getattr(cls, "param_names", ()), strict=True)
    return list(itertools.product(*(x if name == "variant" else x[:1] for x, name in values)))


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_runs(name, load):
    found = benchmarks(load(name))
    assert found
    for cls, method in found:
        for arguments in smallest(cls):
            bench = cls()
            if hasattr(bench, "setup"):
                bench.setup(*arguments)
            result = getattr(bench, method)(*arguments)
            if method.startswith("track_"):
                assert math.isfinite(result)
                assert result > 0
            if method.startswith("timeraw_"):
                subprocess.run([sys.executable, "-c", textwrap.dedent(result)], check=True)


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_says_what_it_measures(name, load):
    for cls, method in benchmarks(load(name)):
        assert inspect.getdoc(cls), cls
        assert inspect.getdoc(getattr(cls, method)), (cls, method)
        assert not method.startswith("track_") or getattr(cls, method).unit


def test_every_variant_is_measured(load):
    measured = [cls for cls, _ in benchmarks(load("bench_variants"))]
    for cls in measured:
        assert cls.params[cls.param_names.index("variant")] == catalog.names()


def test_an_empty_catalogue_is_refused(monkeypatch):
    monkeypatch.setattr(catalog, "names", lambda family=None: ())
    with pytest.raises(RuntimeError, match="catalogue is empty"):
        runpy.run_path(str(ROOT / "benchmarks" / "workload.py"))
