"""What `refattn warmup` compiles is what later processes call, and threads are counted as the user says."""

import importlib
import inspect
import subprocess
import sys

import numba
import numpy as np
import pytest
from typer.testing import CliRunner

import refattn as ra
from refattn import catalog, cli
from refattn.engine import backward, decode, forward, rows, warmup
from refattn.engine.learner import run as learner
from refattn.engine.state import chunked, chunked_backward, quadratic, recurrent, written_first
from refattn.engine.threads import available_threads

RECORDED = """
import numba
from numba.core import event

compiled = event.RecordingListener()
event.register("numba:compile", compiled)
"""
PRINTED = """
print(*(moment.data["dispatcher"].py_func.__name__ for _, moment in compiled.buffer if moment.is_start))
"""
WARM = """
from refattn.engine import warmup

for job in warmup.JOBS:
    if " " not in job.way:  # those of scored attention
        warmup.compiled(job)
"""
CALLS = """
import itertools
import numpy as np
import refattn as ra

rng = np.random.default_rng(0)
for dtype, threads, layout, n_q in itertools.product(("float32", "float16", "float64"), (1, 2), ("BHTD", "BTHD"), (1, 300)):
    ra.set_num_threads(threads)
    def draw(n, width, heads=2):
        return rng.random((2, heads, n, width) if layout == "BHTD" else (2, n, heads, width)).astype(dtype)
    q, k, v = draw(n_q, 65, 4), draw(1500, 65), draw(1500, 7)
    k.flags.writeable = False
    for options in ({}, {"mask": rng.random(1500) > 0.2}, {"bias": rng.random((2, 4, 1, 1500)), "sinks": np.ones(4), "softcap": 3.0}):
        ra.attention(q, k, v, layout=layout, **options, causal=True, backend="cpu")
        ra.gradients("softmax", q, k[:, ::-1], v, d_out=draw(n_q, 7, 4), layout=layout, **options, backend="cpu")
"""


def compiled_in_process(code):
    """The names of the functions that a new process compiles, as opposed to finding them on disk."""
    done = subprocess.run([sys.executable, "-c", RECORDED + code + PRINTED], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.fixture
def threads():
    """What the test sets is undone."""
    before = numba.get_num_threads()
    yield numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(before)


@pytest.mark.compiled
def test_calls_after_a_warm_up_compile_nothing(monkeypatch):
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    compiled_in_process(WARM)
    assert compiled_in_process(CALLS + "numba.njit(lambda x: x)(1)") == ["<lambda>"]  # the last one, so others would have been seen


@pytest.mark.compiled
def test_every_entry_point_is_a_job_once():
    """The plain functions of a kernel module are its entry points; everything else in it is compiled as a part of them."""
    learners = [importlib.import_module("refattn.engine.learner." + name) for name in learner.COMPILED]
    states = (chunked, chunked_backward, quadratic, recurrent, written_first, *learners)
    found = [
        (module.__name__.removeprefix("refattn.engine."), name)
        for module in (forward, decode, rows, backward, *states)
        for name, x in inspect.getmembers(module, inspect.isfunction)
        if x.__module__ == module.__name__ and not hasattr(x, "py_func") and (module not in states or name.endswith(("_alone", "_parallel")))
    ]
    for element in warmup.ELEMENTS:
        assert sorted(warmup.entry(job) for job in warmup.JOBS if job.element == element) == sorted(found)
    assert len({str(job) for job in warmup.JOBS}) == len(warmup.JOBS)


@pytest.mark.compiled
def test_the_command_compiles_every_job_and_definition_and_says_where(monkeypatch):
    done = []
    monkeypatch.setattr(warmup, "compiled", lambda job, real=warmup.compiled: done.append(job) or real(job))
    monkeypatch.setattr(cli.definition, "compiled", lambda variant, real=cli.definition.compiled: done.append(variant.name) or real(variant))
    result = CliRunner().invoke(cli.app, ["warmup"])
    assert result.exit_code == 0, result.output
    assert {*warmup.JOBS, *catalog.names()} <= set(done)
    assert f"{len(warmup.JOBS)} kernels and {len(catalog.names())} definitions" in result.output
    assert str(warmup.cache_folder()) in result.output


def test_nothing_to_compile_is_an_error(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    result = CliRunner().invoke(cli.app, ["warmup"])
    assert isinstance(result.exception, ra.BackendUnavailableError)
    assert "NUMBA_DISABLE_JIT" in str(result.exception)


# ---- threads -------------------------------------------------------------------------------------------------------------------


def test_as_many_threads_are_used_as_were_set(threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for n in (1, threads, np.int64(threads)):
        assert ra.set_num_threads(n) is None
        assert available_threads() == n


@pytest.mark.parametrize("n", [0, -1, 1.0, True, "2", None, [1], 10**9])
def test_what_is_no_number_of_threads_is_refused_and_changes_nothing(n, threads):
    before = numba.get_num_threads()
    with pytest.raises(ra.ParameterError, match=rf"set_num_threads: n=.*; must be a whole number from 1 to [1-{threads}]$"):
        ra.set_num_threads(n)
    assert numba.get_num_threads() == before


def test_more_threads_than_the_environment_allows_are_refused(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ra.set_num_threads(1)
    with pytest.raises(ra.ParameterError, match=r"n=2; must be a whole number from 1 to 1$"):
        ra.set_num_threads(2)
