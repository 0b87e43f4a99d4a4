"""What the CPU kernels read and keep: no copies, no room for all pairs; callers' functions that fail, hide, skip; numbers at the edge."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
import tracemalloc

import ml_dtypes
import numba
import numpy as np
import pytest
from compositions import alibi, by_head, capped, everything, near, nothing
from test_engine import agrees

import refattn as ra
from refattn import ParameterError, catalog
from refattn.engine import threads
from refattn.engine.backward import TILE as KEYS_PER_TILE
from refattn.engine.call import MOST_PARTS
from refattn.engine.run import gradients, run
from refattn.problem import bind

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
FORMATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
NARROW = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
SOFTMAX = catalog.variant("softmax")


def operands(dtype=np.float32, seed=0, *, B=1, Hq=2, Hkv=1, T=5, S=7, D=3, E=4):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((B, Hq, T, D), (B, Hkv, S, D), (B, Hkv, S, E))]


def call_of(q, k, v, name="softmax", layout="BHTD", **keywords):
    return bind(catalog.variant(name), (q, k, v), keywords, ("out",), layout)


# ---- memory ----------------------------------------------------------------------------------------------------------------------


def peak(f):
    """The most bytes that NumPy held beside what it held before."""
    f()  # compiled, and whatever is kept is
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


N_KEYS, WIDTH = 60_000, 64


def key_values(stored, dtype):
    """Keys and values of `N_KEYS`, two heads, as a layout has them; the layout; and how a batch of queries is laid out."""
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return rng.integers(-2, 3, shape).astype(np.int8).astype(dtype)

    if stored == "paged":
        table = rng.permutation(N_KEYS // 16)[None]
        return drawn(N_KEYS // 16, 2, 16, WIDTH), drawn(N_KEYS // 16, 2, 16, WIDTH), ra.Paged(table, np.array([N_KEYS - 3]))
    if stored == "packed":
        return drawn(N_KEYS, 2, WIDTH), drawn(N_KEYS, 2, WIDTH), "packed"
    if stored == "heads inside":
        return drawn(1, N_KEYS, 2, WIDTH), drawn(1, N_KEYS, 2, WIDTH), "BTHD"
    if stored == "one head for all":
        k, v = (np.broadcast_to(drawn(1, 1, N_KEYS, WIDTH), (1, 2, N_KEYS, WIDTH)) for _ in "kv")
        return k, v, "BHTD"
    wide = drawn(1, 2, N_KEYS, 2 * WIDTH)  # keys and values side by side in one cache
    return wide[..., :WIDTH], wide[..., WIDTH:], "BHTD"


@pytest.mark.parametrize("stored", ["paged", "packed", "heads inside", "one head for all", "side by side"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("n_q", [1, 30])  # decoded key by key, and in blocks
def test_keys_and_values_are_read_where_they_stand(stored, dtype, n_q):
    k, v, layout = key_values(stored, dtype)
    q = np.ones((1, 4, n_q, WIDTH), dtype)
    if layout == "packed":
        q, layout = q[0].swapaxes(0, 1), ra.Packed(np.array([0, n_q // 3, n_q]), np.array([0, 17, N_KEYS]))
    q = q.swapaxes(1, 2) if layout == "BTHD" else q
    one_operand = 2 * N_KEYS * WIDTH * np.dtype(dtype).itemsize // (2 if stored == "one head for all" else 1)
    for name in ("softmax", "sigmoid") if isinstance(layout, str) else ("softmax",):
        assert peak(lambda name=name: run(call_of(q, k, v, name, layout))) < one_operand / 2  # a million bytes of it scratch


@pytest.mark.parametrize("stored", ["packed", "heads inside", "one head for all", "side by side"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gradients_copy_neither(stored, dtype):
    k, v, layout = key_values(stored, dtype)
    q = np.ones((1, 4, 5, WIDTH), dtype)
    if layout == "packed":
        q, layout = q[0].swapaxes(0, 1), ra.Packed(np.array([0, 5]), np.array([0, N_KEYS]))
    q = q.swapaxes(1, 2) if layout == "BTHD" else q
    call = call_of(q, k, v, layout=layout)
    results = 4 * (2 * N_KEYS * WIDTH) * 2  # d_k and d_v, float32
    allowed = 2 * results + results // 16  # and the sums of the only part there is
    assert peak(lambda: gradients(call, {"out": np.ones((1, 4, 5, WIDTH), dtype)})) < allowed


def test_a_bias_of_keys_needs_no_room_for_pairs():
    n = 4096
    call = call_of(*operands(T=n, S=n, D=16, E=16, Hq=2, Hkv=2), bias=np.zeros((1, 2, 1, n), np.float32))
    assert peak(lambda: gradients(call, {"out": np.ones((1, 2, n, 16), np.float32)})) < 4 * n * n / 4


GROWTH = """
import numpy as np
import refattn as ra

def held(name):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def both(n, width):
    q, k, v, d_out = (np.ones((1, 1, n, width), np.float32) for _ in range(4))
    return ra.attention(q, k, v, causal=True, backend="cpu"), ra.gradients("softmax", q, k, v, d_out=d_out, causal=True, backend="cpu")

both(300, WIDTH)  # loads what there is to load
before = held("VmRSS")
both(LENGTH, WIDTH)
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux how much memory was held")
def test_forward_and_backward_need_memory_in_proportion_to_the_sequence():
    n, width = 16384, 64
    code = GROWTH.replace("LENGTH", str(n)).replace("WIDTH", str(width))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = 4 * n * width
    allowed = (4 + 2 + 4 + 4 + 2 * MOST_PARTS) * rows  # operands, out twice, gradients and outputs, the same in their dtype, parts of d_k and d_v
    assert int(done.stdout) < allowed + 2**24 < 4 * n * n / 4


# ---- functions that raise, or read past an end -----------------------------------------------------------------------------------


def refuses(score, b, h, i, j):
    if i == 20 and j == 3:
        raise ValueError("not this one")
    return score


def refuses_early(score, b, h, i, j):
    if j == 3:
        raise ValueError("not this one")
    return score


def refuses_to_say(b, h, i, j):
    if j == 3:
        raise ValueError("not this one")
    return True


def reads_past_the_end(score, b, h, i, j, slopes):
    return score + slopes[b, h + 100]


def unchanged(score, b, h, i, j):
    return score


@pytest.fixture
def ignored(monkeypatch):
    """What Numba printed as ignored."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: found.append(report.exc_value))
    return found


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("name, n_q", [("softmax", 1), ("softmax", 30), ("sigmoid", 30), ("sparsemax", 30)])
def test_a_function_that_raises_is_an_error_of_the_call_and_of_no_other(name, n_q, n_threads, ignored, monkeypatch):
    monkeypatch.setattr(threads, "PARALLEL_FROM", 0)
    x = operands(T=n_q, S=40)
    for functions in ({"score_mod": refuses if n_q > 20 else refuses_early}, {"mask_mod": refuses_to_say}):
        with pytest.raises(ParameterError, match=rf"^{name}: .* raised an error, which Numba has printed$"):
            run(call_of(*x, name, **functions), n_threads)
        run(call_of(*x, name, score_mod=unchanged), n_threads)
    assert {str(error) for error in ignored} == {"not this one"}
    with pytest.raises(ParameterError, match=rf"^{name}: .* raised an error"):
        gradients(call_of(*x, name, score_mod=unchanged, slope=refuses_early), {"out": np.ones((1, 2, n_q, 4))}, n_threads)


def test_a_map_of_a_function_that_raises_is_an_error(ignored):
    with pytest.raises(ParameterError, match=r"^block_mask: mask_mod raised an error"):
        ra.block_mask(refuses_to_say, T=200, S=200)
    assert ignored


def test_an_index_past_the_end_of_aux_is_an_error_where_indices_are_checked(ignored, monkeypatch):
    monkeypatch.setattr(numba.config, "BOUNDSCHECK", 1)
    for n_q in (1, 30):
        with pytest.raises(ParameterError, match=r"^softmax: .* raised an error"):
            run(call_of(*operands(T=n_q, S=40), score_mod=reads_past_the_end, aux=np.ones((1, 2))))
    assert {type(error) for error in ignored} == {IndexError}


# ---- functions that hide ---------------------------------------------------------------------------------------------------------

NAMES = pytest.mark.parametrize("name", ["softmax", "sigmoid", "relu", "sparsemax", "entmax15"])


@NAMES
@FORMATS
def test_a_mask_that_shows_nothing_or_everything(name, dtype):
    for n_q, block in itertools.product((2, 60), (None, (128, 128), (7, 3))):
        x = operands(dtype, T=n_q, S=150)
        all_, none = (
            {"mask_mod": function} if block is None else {"block_mask": ra.block_mask(function, T=n_q, S=150, block=block)}
            for function in (everything, nothing)
        )
        found = agrees(call_of(*x, name, **all_))
        if n_q > 2:  # of few queries, a map has tiles of its own
            same(found["out"], run(call_of(*x, name))["out"])
        hidden = run(call_of(*x, name, **none))["out"]
        same(hidden, np.zeros_like(hidden))


@NAMES
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@FORMATS
def test_what_a_mask_mod_hides_never_reaches_the_output(name, poison, dtype):
    def shown(b, h, i, j):
        return j < 100 and j % 7 != h

    for n_q in (2, 60):
        q, k, v = operands(dtype, T=n_q, S=150, Hq=4)
        bad_k, bad_v = (np.where((np.arange(150) < 100)[:, None], x, poison).astype(dtype) for x in (k, v))
        worse_v = bad_v.copy()
        worse_v[:, :, [0, 35, 70]] = poison  # hidden from the first head only
        for functions in ({"mask_mod": shown}, {"block_mask": ra.block_mask(shown, T=n_q, S=150, Hq=4, block=(16, 8))}):
            assert np.isfinite(agrees(call_of(q, bad_k, bad_v, name, **functions))["out"]).all()
            assert np.isfinite(agrees(call_of(q, bad_k, worse_v, name, **functions))["out"][:, 0]).all()


@NAMES
@FORMATS
def test_a_block_that_a_map_says_is_hidden_is_not_asked_about(name, dtype):
    """A function that would show everything, with the map of one that hides: a tile is then hidden because the map says so."""
    for n_q in (2, 96):
        q, k, v = operands(dtype, T=n_q, S=384, Hq=2)
        k[:, :, 128:256] = v[:, :, 128:256] = np.nan
        blocks = ra.block_mask(everything, T=n_q, S=384, block=(128, 128))
        hides = blocks.classes.copy()
        hides[..., 1] = 0
        found = run(call_of(q, k, v, name, block_mask=dataclasses.replace(blocks, classes=hides)))["out"]
        assert np.isfinite(found).all()
        others = np.r_[:128, 256:384]
        shift = {"shift": -np.log(384.0)} if name == "sigmoid" else {"divisor": 384.0} if name == "relu" else {}
        alone = run(call_of(q, k[:, :, others], v[:, :, others], name, **shift))["out"]
        size = np.abs(v[:, :, others]).sum() * np.finfo(dtype).eps
        assert (np.abs(found - alone) <= size).all()


# ---- functions of every place ----------------------------------------------------------------------------------------------------


@FORMATS
def test_functions_are_told_the_batch(dtype):
    slopes = np.linspace(0, 3, 12).reshape(3, 4)
    for n_q in (2, 40):
        x = operands(dtype, B=3, Hq=4, Hkv=2, T=n_q, S=70)
        found = run(call_of(*x, score_mod=alibi, mask_mod=by_head, aux={"slopes": slopes}))["out"]
        for b in range(3):
            one = [y[[b]] for y in x]
            i, j = np.ogrid[:n_q, :70]
            h = np.arange(4)[:, None, None]
            alone = call_of(*one, bias=-slopes[b][:, None, None] * abs(i - j), mask=(b + i + j) % (h + 2) != 0)
            assert (np.abs(found[[b]] - run(alone)["out"]) <= 2 * ra.tolerance("softmax", *one, **keywords_of(alone)).out).all()


def keywords_of(call):
    return {name: x for name, x in call.given.items() if name in ("bias", "mask")}


def test_several_python_threads_may_lift_functions_at_once():
    """Functions nobody has compiled before, the same ones in all threads and different ones."""

    def shifted(by):
        def mod(score, b, h, i, j):
            return score + by * j

        return mod

    x = operands(T=30, S=50)
    mods = [shifted(0.125 * n) for n in range(1, 4)]
    found = {}

    def work(n):
        for m in range(3):
            found[n, (n + m) % 3] = run(call_of(*x, score_mod=mods[(n + m) % 3], mask_mod=near))["out"]

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 12
    for (_, m), out in found.items():
        same(out, run(call_of(*x, score_mod=mods[m], mask_mod=near))["out"])
        agrees(call_of(*x, score_mod=mods[m], mask_mod=near))


# ---- extremes --------------------------------------------------------------------------------------------------------------------

STATISTIC = ("out", "lse")


@FORMATS
def test_a_sink_of_nan_makes_its_head_nan_and_an_infinite_one_takes_all(dtype):
    for n_q in (2, 60):
        x = operands(dtype, Hq=4, T=n_q, S=90)
        for sinks in ([np.nan, 0, -np.inf, 2], [np.inf, 0, 1, 2]):
            call = bind(SOFTMAX, x, {"sinks": np.array(sinks, dtype), "causal": "top_left"}, STATISTIC)
            found = run(call)
            finite = np.isfinite(sinks) | np.isneginf(sinks)
            assert np.isfinite(found["out"][:, finite]).all()
            if np.isnan(sinks[0]):
                agrees(call)
                assert np.isnan(found["out"][:, 0]).all() and np.isnan(found["lse"][:, 0]).all()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("functions", [{}, {"score_mod": capped}, {"causal": True, "softcap": 30.0}], ids=["alone", "capped", "soft-cap"])
@FORMATS
def test_huge_scores_give_what_the_definition_gives(dtype, functions, size):
    for n_q in (2, 60):
        q, k, v = operands(dtype, T=n_q, S=90)
        for scale in (1.0, -1.0, 0.0):
            agrees(bind(SOFTMAX, (q * dtype(size), k, v), {"scale": scale, **functions}, STATISTIC))


@pytest.mark.parametrize("group", [1, 3, 7])
@FORMATS
def test_any_number_of_rows_gives_what_the_definition_gives(dtype, group):
    for n_q in range(1, 201):
        agrees(bind(SOFTMAX, operands(dtype, n_q, Hq=group, T=n_q, S=KEYS_PER_TILE + 3), {"causal": n_q % 2 == 0}, STATISTIC))
