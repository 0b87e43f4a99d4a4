"""The CPU kernels against the definition, within the computed tolerance, and against themselves, to the bit."""

import itertools
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from compositions import compositions
from hypothesis import HealthCheck, given, settings

import refattn as ra
from refattn import backends, catalog, definition
from refattn.engine import threads
from refattn.engine.run import format_of, run
from refattn.oracle.profiles import resolve
from refattn.oracle.tolerance import tolerances
from refattn.problem import bind

pytestmark = pytest.mark.compiled

same = np.testing.assert_array_equal
FORMATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SOFTMAX = catalog.variant("softmax")


def operands(dtype=np.float32, seed=0, *, B=1, Hq=2, Hkv=1, T=5, S=7, D=3, E=4):
    """Queries, keys and values with an outlier each, so that running maxima rise late and fall short."""
    rng = np.random.default_rng(seed)
    drawn = [rng.standard_normal(shape) for shape in ((B, Hq, T, D), (B, Hkv, S, D), (B, Hkv, S, E))]
    for x in drawn:
        if x.size:
            x.flat[rng.integers(x.size)] *= 8
    return [x.astype(dtype) for x in drawn]


def call_of(q, k, v, **keywords):
    return bind(SOFTMAX, (q, k, v), keywords, ("out", "lse"))


def agrees(call, n_threads=1):
    """All outputs lie within the tolerance of the definition's, as kernels return them; where that is not finite they are the same."""
    truth, found, kernel = definition.run(call), run(call, n_threads), format_of(call)
    allowed = tolerances(call, truth, resolve("flash", kernel), dtypes=dict.fromkeys(call.returns, kernel))
    for name, x in found.items():
        finite = np.isfinite(truth[name])
        same(np.where(finite, 0, x), np.where(finite, 0, truth[name]), name)
        excess = np.abs(np.subtract(x, truth[name], where=finite, out=np.zeros(x.shape))) - allowed[name]
        assert (excess <= 0).all(), f"{name} at {np.unravel_index(excess.argmax(), excess.shape)}: past the tolerance by {excess.max():g}"
    return found


# ---- against the definition ----------------------------------------------------------------------------------------------------

SIZES = (0, 1, 2, 15, 16, 17, 47, 48, 49, 127, 128, 129, 130, 193)  # about a vector, a panel, a tile


@FORMATS
@pytest.mark.parametrize("n_q", SIZES)
def test_every_size_gives_what_the_definition_gives(n_q, dtype):
    for n_k in SIZES:
        q, k, v = operands(dtype, n_k, T=n_q, S=n_k)
        bias = np.linspace(-2, 2, n_q * n_k).reshape(n_q, n_k)[:, ::-1]
        agrees(call_of(q, k, v))
        agrees(call_of(q, k, v, causal=True, bias=bias, softcap=2.0, window=(20, None)))


@FORMATS
@pytest.mark.parametrize("n_k", [511, 513, 1023, 1024, 1025, 2100])
def test_few_queries_and_many_keys_give_what_the_definition_gives(n_k, dtype):
    """Tiles and stretches of keys, merged."""
    for n_q, heads, options in ((1, 2, {}), (1, 14, {"causal": True}), (3, 4, {"causal": True, "window": (1030, 0)}), (2, 4, {"softcap": 2.0})):
        q, k, v = operands(dtype, B=2, Hq=heads, Hkv=2, T=n_q, S=n_k, D=17, E=9)
        agrees(call_of(q, k, v, bias=np.linspace(3, -3, n_k), **options))
        agrees(call_of(q, k, v, sinks=np.linspace(-1, 1, heads), **options))


@FORMATS
@pytest.mark.parametrize("n_k", [1, 7, 8, 9, 33, 300])
@pytest.mark.parametrize("narrow", [None, ml_dtypes.bfloat16])
def test_rows_of_every_number_taken_in_order_give_what_the_definition_gives(n_k, dtype, narrow):
    """Four at a time up to half a panel, and panels from there on; wide values, whole vectors and a rest; keys and values decoded in parts."""
    for rows in (1, 3, 4, 5, 8, 12, 13, 23, 24, 25):
        q, k, v = operands(dtype, rows, Hq=rows, S=n_k, T=1, D=80, E=150)
        if narrow:
            k, v = k.astype(narrow), v.astype(narrow)
            q = q.astype(narrow) if dtype == np.float32 else q
        agrees(call_of(q, k, v))
        agrees(call_of(q, k, v, mask=np.arange(n_k) % 5 > 0, softcap=3.0))


@FORMATS
@pytest.mark.parametrize("width", [1, 3, 40, 65, 128, 130])
def test_every_width_gives_what_the_definition_gives(width, dtype):
    for d, e, group in ((width, 5, 1), (5, width, 2), (width, width, 7)):
        agrees(call_of(*operands(dtype, D=d, E=e, T=19, S=35, B=2, Hkv=2, Hq=2 * group), causal=True))


@FORMATS
@pytest.mark.parametrize("n", SIZES)
def test_cosines_and_a_residual_give_what_the_definition_gives(n, dtype):
    variant = catalog.variant("cosine_residual")
    for width in (1, 3, 64):
        _, _, v = operands(dtype, n, B=2, S=n, Hkv=1, E=width)
        v = v[:, 0] * 2.0 ** np.linspace(-40, 40, n)[:, None].astype(dtype)  # tokens of very different lengths
        v[:, n // 2 : n // 2 + 1] = 0.0  # and one of none
        call = bind(variant, (v,), {}, ("out",))
        for threads_ in (1, 2):
            agrees(call, threads_)
    with pytest.raises(ra.BackendUnavailableError, match="it does not return weights"):
        ra.attend("cosine_residual", v, returns="weights", backend="cpu")


@FORMATS
@pytest.mark.parametrize("n_q", SIZES)
def test_bilinear_scores_give_what_the_definition_gives(n_q, dtype):
    rng = np.random.default_rng(n_q)
    for n_k, d_q, d_k in ((n_q, 5, 5), (7, 3, 20), (130, 20, 3)):
        q, k, v = operands(dtype, n_q, B=2, Hq=1, T=n_q, S=n_k, D=d_k)
        q = rng.standard_normal((2, n_q, d_q)).astype(dtype)
        w = (rng.standard_normal((d_q, d_k)) / d_k**0.5).astype(dtype)
        for threads_ in (1, 2):
            agrees(bind(catalog.variant("luong_general"), (q, k[:, 0], v[:, 0], w), {}, ("out",)), threads_)
        agrees(bind(catalog.variant("luong_general"), (q, k[:, 0], v[:, 0], w), {"mask": rng.random((n_q, n_k)) > 0.3}, ("out",)))


@FORMATS
@pytest.mark.parametrize("empty_rows", ["zero", "nan", "uniform"])
def test_every_combination_of_options_gives_what_the_definition_gives(empty_rows, dtype):
    rng = np.random.default_rng(7)
    q, k, v = operands(dtype, B=2, Hq=4, Hkv=2, T=21, S=33, D=6, E=5)
    bias, mask = rng.standard_normal((2, 4, 21, 33)).astype(dtype), rng.random((2, 4, 21, 33)) > 0.4
    mask[:, :, :4] = False  # rows that see nothing
    options = {
        "causal": (False, True, "top_left"),
        "window": (None, (5, 0), (2, 9)),
        "softcap": (None, 3.0),
        "bias": (None, bias[0, 0, 0, 0], bias[0, 0, 0], bias[:1, :, :1, :1], bias[:, :1], bias),
        "mask": (None, mask[0, 0, 9], mask),
        "sinks": (None, np.array([-np.inf, 0.0, 3.0, -40.0], dtype)),
    }
    for chosen in itertools.product(*options.values()):
        agrees(call_of(q, k, v, **dict(zip(options, chosen, strict=True)), empty_rows=empty_rows))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(compositions())
def test_random_compositions_give_what_the_definition_gives(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "PARALLEL_FROM", 0)
        alone = agrees(call)
        for name, x in run(call, 2).items():
            same(x, alone[name])


def test_another_variant_of_the_same_plan_runs_too():
    q, k, v = (x[:, 0] for x in operands(B=2, T=30, S=45))
    mask = np.random.default_rng(3).random((2, 30, 45)) > 0.3
    call = bind(catalog.variant("luong_dot"), (q, k, v), {"mask": mask}, ("out",))
    found, truth = run(call)["out"], definition.run(call)
    assert found.shape == (2, 30, 4)
    assert (np.abs(found - truth["out"]) <= tolerances(call, truth, resolve("flash", call.dtype))["out"]).all()


@FORMATS
def test_the_judge_passes_the_kernels_on_its_full_suite(dtype):
    def candidate(q, k, v, **keywords):
        return ra.attention(q, k, v, backend="cpu", returns=("out", "lse"), **keywords)

    report = ra.check(candidate, "softmax", suite="full", dtype=dtype, returns=("out", "lse"))
    assert report.passed, str(report)


# ---- what must not be read, and what must ----------------------------------------------------------------------------------------

POISON = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
#: Parameters under which no query sees the keys of the slice.
HIDING = {
    "causal": ({"causal": "top_left"}, slice(130, None)),
    "window": ({"window": (6, 0)}, slice(0, 4)),
    "mask": ({"mask": np.arange(140) < 135}, slice(135, None)),
    "capped": ({"causal": "top_left", "softcap": 5.0}, slice(130, None)),
    "biased": ({"causal": "top_left", "bias": np.linspace(-1, 1, 140)}, slice(130, None)),
}


@POISON
@pytest.mark.parametrize("way", HIDING)
@FORMATS
def test_what_a_query_does_not_see_never_reaches_it(dtype, way, poison):
    params, hidden = HIDING[way]
    for n_q in (130, 2):  # the first in blocks, the others key by key
        q, k, v = operands(dtype, Hq=3, T=n_q, S=140, D=5)
        k[:, :, hidden], v[:, :, hidden] = poison, poison
        found = agrees(call_of(q, k, v, **params))
        assert np.isfinite(found["out"]).all() and np.isfinite(found["lse"]).all()


@POISON
@FORMATS
def test_a_value_under_a_bias_of_minus_infinity_is_not_read(dtype, poison):
    bias = np.where(np.arange(140) < 135, 0.0, -np.inf).astype(dtype)
    for n_q in (140, 2):
        q, k, v = operands(dtype, T=n_q, S=140)
        v[:, :, 135:] = poison
        assert np.isfinite(agrees(call_of(q, k, v, bias=bias))["out"]).all()


@POISON
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"causal": True}, {"bias": np.zeros(140)}])
@FORMATS
def test_what_a_query_sees_always_reaches_it(dtype, options, poison):
    for n_q, j in itertools.product((140, 2), (0, 70, 139)):
        q, k, v = operands(dtype, T=n_q, S=140)
        v[0, 0, j, 1] = poison
        agrees(call_of(q, k, v, **options))
        k[0, 0, j, 2] = np.nan
        agrees(call_of(q, k, v, **options))


@FORMATS
def test_a_value_of_a_key_that_is_seen_counts_even_where_its_weight_vanishes(dtype):
    """0 * NaN is NaN in the definition; only hidden keys are not read."""
    for n_q in (3, 20):
        q, k, v = np.ones((1, 1, n_q, 1), dtype), np.array([0.0, -5e3, 1.0], dtype).reshape(1, 1, 3, 1), np.ones((1, 1, 3, 2), dtype)
        v[0, 0, 1, 0] = np.nan
        agrees(call_of(q, k, v, causal="top_left"))


# ---- numbers at the edge of the format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -1.0, -300.0, 1e-30])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 2.0}, {"causal": True, "sinks": np.zeros(2)}])
@FORMATS
def test_any_scale_gives_what_the_definition_gives(dtype, options, scale):
    for n_q in (60, 3):
        agrees(call_of(*operands(dtype, T=n_q, S=150), scale=scale, **options))


# ---- operands as they come --------------------------------------------------------------------------------------------------------


def reversed_(x):
    return np.flip(np.flip(x).copy())


def every_other(x):
    wide = np.full([2 * n for n in x.shape], np.nan, x.dtype)
    wide[tuple(slice(None, None, 2) for _ in x.shape)] = x
    return wide[tuple(slice(None, None, 2) for _ in x.shape)]


def heads_inside(x):
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) if x.ndim == 4 else x


def unaligned(x):
    raw = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    raw[...] = x
    return raw


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


STORED = [reversed_, every_other, heads_inside, unaligned, read_only, np.asfortranarray, lambda x: x.astype(x.dtype.newbyteorder())]


@pytest.mark.parametrize("stored", STORED, ids=["reversed", "every other", "heads inside", "unaligned", "read-only", "Fortran", "byte-swapped"])
def test_memory_order_changes_no_bit_and_operands_stay_as_they_were(stored):
    q, k, v = operands(B=2, Hq=4, Hkv=2, T=33, S=50, D=17, E=18)
    bias, sinks = np.linspace(-1, 1, 33 * 50, dtype=np.float32).reshape(33, 50), np.arange(4, dtype=np.float32)
    named = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    expected = run(bind(SOFTMAX, (), named, ("out", "lse")))
    given_ = {name: stored(x) for name, x in named.items()}
    kept = {name: x.copy() for name, x in given_.items()}
    for name, x in run(bind(SOFTMAX, (), given_, ("out", "lse"))).items():
        same(x, expected[name])
    for name, x in given_.items():
        same(x, kept[name])


def test_broadcast_operands_and_the_other_layout_change_no_bit():
    q, k, v = operands(B=1, Hq=2, T=33, S=50, D=17, E=18)
    q, k, v = (np.broadcast_to(x, (3, *x.shape[1:])) for x in (q, k, v))
    expected = ra.attention(*(x.copy() for x in (q, k, v)), backend="cpu", causal=True)
    same(ra.attention(q, k, v, backend="cpu", causal=True), expected)
    same(ra.attention(*(x.swapaxes(1, 2) for x in (q, k, v)), backend="cpu", causal=True, layout="BTHD").swapaxes(1, 2), expected)


# ---- threads and processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 4.0}, {"bias": np.zeros((1, 300), np.float32)}])
@FORMATS
def test_any_number_of_threads_gives_the_same_bits(dtype, options):
    params = {name: x.astype(dtype) if name == "bias" else x for name, x in options.items()}
    for sizes in ({"T": 200, "S": 300}, {"T": 1, "S": 9000}):
        call = call_of(*operands(dtype, Hq=6, Hkv=2, D=20, E=12, **sizes), **(params if sizes["S"] == 300 else {}))
        alone = run(call, 1)
        for n_threads in (2, 3):
            for name, x in run(call, n_threads).items():
                same(x, alone[name])


MANY = """
import sys, threading
import numpy as np
import refattn as ra
rng = np.random.default_rng(0)
calls = [[rng.standard_normal((1, 4, 200, 40)).astype(np.float32) for _ in range(3)] for _ in range(8)]
expected = [ra.attention(*call, causal=True, backend="definition") for call in calls]
found = [None] * 8
def work(n):
    found[n] = [ra.attention(*calls[n], causal=True, backend="cpu") for _ in range(5)]
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for n in range(8):
    allowed = ra.tolerance("softmax", *calls[n], causal=True, returns="out").out
    assert all(np.array_equal(x, found[n][0]) for x in found[n]) and (np.abs(found[n][0] - expected[n]) <= allowed).all()
print("right")
"""

FORKED = """
import os, sys
import numpy as np
import refattn as ra
q, k, v = (np.random.default_rng(n).standard_normal((1, 8, 300, 64)).astype(np.float32) for n in range(3))
before = ra.attention(q, k, v, backend="cpu")
child = os.fork()
if child == 0:
    try:
        os._exit(0 if np.array_equal(ra.attention(q, k, v, backend="cpu"), before) else 3)
    except ra.RefattnError as refusal:
        os._exit(0 if "fork" in str(refusal) else 4)
_, status = os.waitpid(child, 0)
print("right" if status == 0 else f"child ended with {status}")
"""


def printed_by(code, **environment):
    """What a fresh process prints that runs `code` with at least two threads."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr[-2000:]


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_many_python_threads_may_call_at_once(layer):
    assert printed_by(MANY, NUMBA_THREADING_LAYER=layer) == "right"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_a_forked_child_computes_the_same_or_refuses_clearly(layer):
    assert printed_by(FORKED, NUMBA_THREADING_LAYER=layer) == "right"


# ---- choosing it ------------------------------------------------------------------------------------------------------------------


def test_a_call_the_kernels_do_not_run_is_refused_with_its_reason():
    q, k, v = operands()
    rows, sequences = [x[0].swapaxes(0, 1) for x in (q, k, v)], ra.Packed(np.array([0, 2, 5]), np.array([0, 3, 7]))
    layer = np.ones((2, 6), np.float32), np.ones(2, np.float32)
    for name, given_, keywords, reason in (
        ("softmax", (q, k, v), {"returns": "weights"}, "it does not return weights"),
        ("softmax", (q, k, v), {"scale": 1e39}, "1e[+]39 is beyond float32"),
        ("softmax", rows, {"layout": sequences, "empty_rows": "uniform"}, "no kernel for the mean of a sequence's values"),
        ("sigmoid", rows, {"layout": sequences}, "its numbers differ from sequence to sequence"),
        ("stick_breaking", (q, k, v), {}, "it has no plan"),
        ("luong_concat", (q[:, 0], k[:, 0], v[:, 0], *layer), {}, "no kernel for softmax of concat scores"),
    ):
        with pytest.raises(ra.BackendUnavailableError, match=f"^{name}: .*'cpu'.*: .*{reason}; use 'definition' or 'auto'"):
            ra.attend(name, *given_, backend="cpu", **keywords)
        ra.attend(name, *given_, **keywords)


def test_auto_chooses_the_kernels_where_they_run():
    call = call_of(*operands(T=30, S=30))
    for name, x in backends.run(call, "auto").items():
        same(x, run(call)[name])
        assert x.dtype == np.float32


PLAIN = """
import numpy as np
import refattn as ra
q = np.ones((1, 1, 9, 16), np.float32)
assert (ra.attention(q, q, q) == 1).all()
try:
    ra.attention(q, q, q, backend="cpu")
except ra.BackendUnavailableError as refusal:
    print(refusal)
"""


def test_without_a_compiler_auto_chooses_the_definition_and_cpu_says_why():
    assert printed_by(PLAIN, NUMBA_DISABLE_JIT="1").startswith("softmax: backend 'cpu' does not run this call: NUMBA_DISABLE_JIT is set")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_widths_that_are_not_contiguous_are_read_in_order(dtype):
    operands_in_order = operands(np.dtype(dtype), T=20, S=30, D=6, E=6)
    turned = [np.ascontiguousarray(np.swapaxes(x, 2, 3)).swapaxes(2, 3) for x in operands_in_order]
    for name, x in run(call_of(*operands_in_order)).items():
        same(run(call_of(*turned))[name], x, name)
