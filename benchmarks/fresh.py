"""What can be measured in a process of its own only: the first call of a process, and how much memory a call takes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Where Linux says how many pages are resident; without it memory is not measured.
STATUS = Path("/proc/self/status")
#: A call that the engine's prefill kernel answers.
FIRST = """
import time
start = time.perf_counter()
import numpy as np
import refattn as ra
x = np.ones((1, 8, 128, 64), np.float32)
ra.attention(x, x, x, backend="cpu")
print(time.perf_counter() - start)
"""
MEMORY = """
import ctypes, json, sys, time
import numpy as np
import refattn as ra
from benchmarks.fresh import resident

way, length = sys.argv[1], int(sys.argv[2])

def call(q, k, v, d_out):
    if way == "forward":
        return (ra.attention(q, k, v, backend="cpu"),)
    return ra.gradients("softmax", q, k, v, d_out=d_out, backend="cpu")

rng = np.random.default_rng(0)
call(*(rng.standard_normal((1, 1, 1024, 64), np.float32) for _ in range(4)))  # kernels and threads are there
operands = [rng.standard_normal((1, 1, length, 64), np.float32) for _ in range(4)]
give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
if give_back is not None:
    give_back(0)  # or results would be written where the first call's arrays were, and not count
before, start = resident("VmRSS"), time.perf_counter()
results = call(*operands)
seconds = time.perf_counter() - start
print(json.dumps({"extra": resident("VmHWM") - before - sum(x.nbytes for x in results), "seconds": seconds}))
"""


def resident(which: str) -> int:
    """Bytes of this process that are in memory: now (``"VmRSS"``), or at most so far (``"VmHWM"``)."""
    return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(which))


def first_call(threads: int, warm_runs: int = 5) -> tuple[float, float]:
    """Seconds of imports and the first call of a new process: with an empty cache of compiled code, and the median with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        cold = float(_run(FIRST, threads, NUMBA_CACHE_DIR=cache))
        return cold, statistics.median(float(_run(FIRST, threads, NUMBA_CACHE_DIR=cache)) for _ in range(warm_runs))


def memory(way: str, length: int, threads: int) -> tuple[int, float]:
    """Peak bytes beyond operands and results of one call on one head of width 64, float32, and its seconds.

    The peak is the kernel's own count of resident pages (Linux), above what was resident when the call began.

    Parameters
    ----------
    way : {"forward", "training"}
    length : int
        T = S.
    threads : int
    """
    found = json.loads(_run(MEMORY, threads, way, str(length)))
    return found["extra"], found["seconds"]


def _run(program: str, threads: int, *arguments: str, **environment: str) -> str:
    pools = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env={**os.environ, **pools, "PYTHONPATH": path, **environment}, check=True, capture_output=True, text=True)
    return done.stdout
