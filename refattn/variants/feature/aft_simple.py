"""AFT-simple: each channel of the values is averaged by the exponentials of its own keys, once for all, and gated by the query.

    m_ix   = sum_{j visible} exp(k_jx) v_jx / sum_{j visible} exp(k_jx)
    out_ix = m_ix / (1 + exp(-q_ix))

No weight depends on the query's content, so the average is one for all queries or, ``causal``, runs along the keys.  All exponents are taken relative
to a running maximum:

    max_j = max(max_(j-1), k_j),   state_j = exp(max_(j-1) - max_j) state_(j-1) + exp(k_j - max_j) v_j,   mass_j the same of ones

``state``, ``mass`` and ``max`` are those after the last key, ``initial_state``, ``initial_mass`` and ``initial_max`` those before the first, seen by
every query; so a sequence can be cut anywhere and carried on.  A state whose maximum is -inf counts for nothing.  ``causal=True`` lets query i
see keys up to ``i + S - T``.  A query that sees nothing gives 0.

What people get wrong: carrying sums of raw exponentials, which overflow; a softmax over channels instead of tokens.  `rwkv4` is the causal average
with keys that fade and a bonus for the newest, its gate by the query left to the caller.

Checked against aft_pytorch's AFTSimple, and causally against PyTorch's cumsum.
"""

import math

import numpy as np

from refattn.spec import Choice, Cost, Example, Identity, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, initial_state, initial_mass, initial_max, causal):
    batch, n_q, width = q.shape
    n_k = k.shape[1]
    out = np.zeros((batch, n_q, width))
    state = np.zeros((batch, width))
    mass = np.zeros((batch, width))
    top = np.zeros((batch, width))
    for b in range(batch):
        for x in range(width):
            state[b, x] = initial_state[b, x]
            mass[b, x] = initial_mass[b, x]
            top[b, x] = initial_max[b, x]
            seen = 0
            for i in range(n_q + 1):  # after the last query, the keys that none has read
                visible = n_k if causal == 0 or i == n_q else i + n_k - n_q + 1
                for j in range(seen, visible):
                    new = k[b, j, x] if k[b, j, x] > top[b, x] or math.isnan(k[b, j, x]) else top[b, x]  # NaN must win
                    if new == -np.inf:
                        continue
                    old, weight = math.exp(top[b, x] - new), math.exp(k[b, j, x] - new)
                    state[b, x] = old * state[b, x] + weight * v[b, j, x]
                    mass[b, x] = old * mass[b, x] + weight
                    top[b, x] = new
                seen = max(seen, visible)
                if i < n_q and top[b, x] != -np.inf:
                    if q[b, i, x] >= 0.0:
                        gate = 1.0 / (1.0 + math.exp(-q[b, i, x]))
                    else:  # the same number, with an exponential that cannot overflow
                        gate = math.exp(q[b, i, x])
                        gate = gate / (1.0 + gate)
                    out[b, i, x] = gate * state[b, x] / mass[b, x]
    return out, state, mass, top


def reduction(dims, params):
    """A sum of values and one of ones: held at exp(-max_j) where the average runs, which fades them, and at the largest of all where it does not."""
    causal = params["causal"]

    def maxima(x):
        return np.maximum.accumulate(np.concatenate([x["initial_max"][:, None], x["k"]], axis=1), axis=1)

    def operands(x):
        m = maxima(x)
        before, after = (m[:, :-1], m[:, 1:]) if causal else (m[:, :1], m[:, -1:])
        nothing = after == -np.inf  # nothing has come yet
        fading, after = np.where(nothing, 0.0, before - after), np.where(nothing, 0.0, after)
        initial = np.concatenate([x["initial_state"][..., None], x["initial_mass"][..., None]], axis=2)
        made = {"k": np.exp(x["k"] - after), "v": np.concatenate([x["v"][..., None], np.ones(x["v"].shape)[..., None]], axis=3)}
        if causal:
            return {**made, "gate": fading, "initial_state": initial}
        return {**made, "initial_state": np.exp(fading[:, 0, :, None]) * initial}

    def outputs(x, found):
        m, visible = maxima(x), np.arange(dims["T"]) + dims["S"] - dims["T"] + 1
        seen = np.maximum(visible, 0) if causal else np.full(dims["T"], dims["S"])
        mass = np.where((m == -np.inf)[:, seen], np.inf, found["out"][..., 1])
        gate = np.exp(-np.logaddexp(0.0, -x["q"]))
        return {"out": gate * found["out"][..., 0] / mass, "state": found["state"][..., 0], "mass": found["state"][..., 1], "max": m[:, -1]}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), query=(), log_decay=("gate",) if causal else (), heads="M", causal=causal),
        {"k": "B S M", "v": "B S M 2", **({"gate": "B S M"} if causal else {}), "initial_state": "B M 2", "out": "B T M 2"},
        operands,
        outputs,
    )


EVERYTHING = ("out", "state", "mass", "max")


def cut_and_carried_on(run, x):
    n_q, n_k = x["q"].shape[1], x["k"].shape[1]
    half = n_q // 2
    seen = max(n_k - n_q + half, 0)
    first = {"q": x["q"][:, :half], **{name: x[name][:, :seen] for name in ("k", "v")}}
    second = {"q": x["q"][:, half:], **{name: x[name][:, seen:] for name in ("k", "v")}}
    one, state, mass, top = run(first, causal=True, returns=EVERYTHING)
    two, *rest = run({**second, "initial_state": state, "initial_mass": mass, "initial_max": top}, causal=True, returns=EVERYTHING)
    return run(x, causal=True, returns=EVERYTHING), (np.concatenate([one, two], axis=1), *rest)


def sums_of_exponentials(run, x):
    n_q, n_k = x["q"].shape[1], x["k"].shape[1]
    seen = np.arange(n_k) <= np.arange(n_q)[:, None] + n_k - n_q
    top = x["k"].max(axis=1, keepdims=True)
    above, below = (np.einsum("ij,bjx->bix", seen, np.exp(x["k"] - top) * values) for values in (x["v"], 1.0))
    gate = np.exp(-np.logaddexp(0.0, -x["q"]))
    return run(x, causal=True), gate * np.divide(above, below, where=below > 0.0, out=np.zeros_like(above))


def constant_keys(run, x):
    return run({**x, "k": np.full_like(x["k"], 0.7)}), x["v"].mean(axis=1, keepdims=True) * np.exp(-np.logaddexp(0.0, -x["q"]))


def last_query_sees_all(run, x):
    last = {**x, "q": x["q"][:, -1:]}
    return run(last, causal=True, returns=EVERYTHING), run(last, returns=EVERYTHING)


def started_by_a_key(run, x):
    first = {"initial_state": x["v"][:, 0], "initial_mass": np.ones_like(x["v"][:, 0]), "initial_max": x["k"][:, 0]}
    rest = {**x, **{name: x[name][:, 1:] for name in ("k", "v")}}
    return run(x, returns=EVERYTHING), run({**rest, **first}, returns=EVERYTHING)


def unfading_rwkv4(run, x):
    n = min(x["q"].shape[1], x["k"].shape[1])
    tokens = {name: x[name][:, -n:] for name in ("q", "k", "v")}
    zero = np.zeros(x["q"].shape[2])
    mean = run({"k": tokens["k"], "v": tokens["v"], "gate": zero, "bonus": zero}, name="rwkv4", returns="out")
    return run(tokens, causal=True), mean * np.exp(-np.logaddexp(0.0, -tokens["q"]))


VARIANT = Variant(
    name="aft_simple",
    family="feature",
    summary="AFT-simple: attention free transformer without position biases, a running average per channel gated by queries.",
    equation="out_i = sigmoid(q_i) * sum_j exp(k_j) v_j / sum_j exp(k_j)",
    paper=Paper(
        title="An Attention Free Transformer",
        authors=(
            "Zhai, Shuangfei",
            "Talbott, Walter",
            "Srivastava, Nitish",
            "Huang, Chen",
            "Goh, Hanlin",
            "Zhang, Ruixiang",
            "Susskind, Josh",
        ),
        year=2021,
        arxiv="2105.14103",
        where="AFT-simple",
    ),
    operands=(
        Operand("q", "B T M", "queries, whose sigmoid gates"),
        Operand("k", "B S M", "keys"),
        Operand("v", "B S M", "values"),
        Operand("initial_state", "B M", "weighted sum of values before the first key", absent=0.0),
        Operand("initial_mass", "B M", "sum of weights before the first key", absent=0.0, draw=lambda rng, shape: rng.uniform(0.5, 2.0, shape)),
        Operand("initial_max", "B M", "logarithm that both are relative to", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B T M", "output"),
        Output("state", "B M", "weighted sum of values after the last key", wide=True),
        Output("mass", "B M", "sum of weights after the last key", wide=True),
        Output("max", "B M", "largest key so far, which both are relative to", wide=True),
    ),
    params=(Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),),
    define=define,
    reduction=reduction,
    cost=Cost(flops="B*M*(9*S + 5*T)", memory="B*M*(T + 3)"),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[math.log(3.0)], [0.0]]], "k": [[[0.0], [math.log(3.0)]]], "v": [[[4.0], [8.0]]]},
            returns={"out": [[[5.25], [3.5]]], "state": [[28.0 / 3.0]], "mass": [[4.0 / 3.0]], "max": [[math.log(3.0)]]},
            source="by hand: weights 1/4 and 3/4 give 7, gated by 3/4 and by 1/2",
        ),
        Example(
            operands={
                "q": [[[0.0], [0.0]]],
                "k": [[[0.0], [math.log(2.0)]]],
                "v": [[[6.0], [10.0]]],
                "initial_state": [[8.0]],
                "initial_mass": [[4.0]],
                "initial_max": [[-math.log(4.0)]],
            },
            params={"causal": True},
            returns={"out": [[[2.0], [3.5]]], "state": [[14.0]], "mass": [[2.0]], "max": [[math.log(2.0)]]},
            source="by hand: one key of value 2 before; (2 + 6)/2, then (2 + 6 + 2*10)/4, both gated by 1/2",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state, mass and maximum", cut_and_carried_on),
        Identity("the running average is the ratio of the summed exponentials", sums_of_exponentials),
        Identity("with equal keys it is the mean, gated", constant_keys),
        Identity("the last query of a causal run sees all keys", last_query_sees_all),
        Identity("a first key is an initial state", started_by_a_key),
        Identity("causal, it is rwkv4 that does not fade and has no bonus, gated", unfading_rwkv4),
    ),
)
