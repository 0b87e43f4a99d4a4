"""Hydra attention: linear attention with as many heads as channels, each of width one.

    phi(x) = x / |x|                 (over all channels; the zero vector stays)
    out_i  = phi(q_i) * sum_(j visible) phi(k_j) * v_j                products channel by channel

The state is one number per channel.  ``causal=True`` puts query i at key ``i + S - T``; the paper sees all keys.  The sum starts at
``initial_state`` (0 if absent) and is returned after the last key as ``state``, so that a sequence can be cut anywhere and carried on.  There
are no heads: operands have the model's width.

What people get wrong: the length is that of the whole vector, not of a head's part, which with heads of width one would leave the sign alone.
There is no denominator, so that outputs grow with the number of keys.

Checked against a composition of PyTorch's normalize and cumsum.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import l2_unit
from refattn.spec import Choice, Cost, Example, Factor, Identity, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, initial_state, causal):
    batch, n_q, width = q.shape
    n_k = k.shape[1]
    out = np.zeros((batch, n_q, width))
    state = np.zeros((batch, width))
    for b in range(batch):
        for x in range(width):
            state[b, x] = initial_state[b, x]
        written = 0
        for i in range(n_q + 1):
            visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
            for j in range(written, visible):
                square = 0.0
                for x in range(width):
                    square += k[b, j, x] * k[b, j, x]
                length = math.sqrt(square)
                if length == 0.0:  # no direction
                    length = np.inf
                for x in range(width):
                    state[b, x] += k[b, j, x] / length * v[b, j, x]
            written = max(written, visible)
            if i == n_q:  # no query is left: that turn was for keys that no query saw
                break
            square = 0.0
            for x in range(width):
                square += q[b, i, x] * q[b, i, x]
            length = math.sqrt(square)
            if length == 0.0:
                length = np.inf
            for x in range(width):
                out[b, i, x] = q[b, i, x] / length * state[b, x]
    return out, state


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=(Factor("k", l2_unit),), value=("v",)),),
        query=(Factor("q", l2_unit),),
        heads="M",
        causal=params["causal"],
    )


def cut_and_carried_on(run, x):
    n, keys = x["q"].shape[1], x["k"].shape[1]
    first = max(n // 2, n - keys)  # queries of the first part; in both parts the last query stands at the last key
    one = {"q": x["q"][:, :first], **{name: x[name][:, : first + keys - n] for name in ("k", "v")}}
    two = {"q": x["q"][:, first:], **{name: x[name][:, first + keys - n :] for name in ("k", "v")}}
    out_1, state = run(one, causal=True, returns=("out", "state"))
    out_2, state = run({**two, "initial_state": state}, causal=True, returns=("out", "state"))
    return run(x, causal=True, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=1), state)


def diagonal_of_the_state(run, x):
    unit = {name: x[name] / np.linalg.norm(x[name], axis=-1, keepdims=True) for name in ("q", "k")}
    state = np.swapaxes(unit["k"], -1, -2) @ x["v"]
    return run(x, causal=False), unit["q"] * np.diagonal(state, axis1=-2, axis2=-1)[:, None]


def lengths_do_not_count(run, x):
    return run(x), run({**x, "q": 3.0 * x["q"], "k": 0.7 * x["k"]})


def linear_in_values(run, x):
    other = np.cos(x["v"])
    both = run({**x, "v": x["v"] + other}, causal=True), run(x, causal=True), run({**x, "v": other}, causal=True)
    return both[0], both[1] + both[2]


VARIANT = Variant(
    name="hydra",
    family="feature",
    summary="Hydra attention: linear attention with as many heads as channels, by directions of queries and keys.",
    equation="out_i = phi(q_i) * sum_j phi(k_j) * v_j, channel by channel, phi(x) = x / |x|",
    paper=Paper(
        title="Hydra Attention: Efficient Attention with Many Heads",
        authors=("Bolya, Daniel", "Fu, Cheng-Yang", "Dai, Xiaoliang", "Zhang, Peizhao", "Hoffman, Judy"),
        year=2022,
        arxiv="2209.07484",
        where="section 3",
    ),
    operands=(
        Operand("q", "B T M", "queries"),
        Operand("k", "B S M", "keys"),
        Operand("v", "B S M", "values"),
        Operand("initial_state", "B M", "sum of features times values of earlier keys", absent=0.0),
    ),
    outputs=(
        Output("out", "B T M", "attention output"),
        Output("state", "B M", "sum of features times values, after the last key", wide=True),
    ),
    params=(Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*(S*(1 + 5*M) + T*(1 + 4*M))",
        memory="B*(T + 1)*M",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[3.0, 4.0]]], "k": [[[5.0, 0.0], [0.0, -2.0]]], "v": [[[10.0, 1.0], [1.0, 5.0]]]},
            returns={"out": [[[6.0, -4.0]]], "state": [[10.0, -5.0]]},
            source="by hand: phi(k) = (1, 0) and (0, -1), phi(q) = (0.6, 0.8)",
        ),
        Example(
            operands={"q": [[[-2.0], [0.0], [7.0]]], "k": [[[1.0], [-3.0], [2.0]]], "v": [[[4.0], [8.0], [1.0]]]},
            params={"causal": True},
            returns={"out": [[[-4.0], [0.0], [-3.0]]]},
            source="by hand: of width one only signs are left; sums 4, -4, -3",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is the diagonal of linear attention's state", diagonal_of_the_state),
        Identity("the lengths of queries and keys do not count", lengths_do_not_count),
        Identity("it is linear in the values", linear_in_values),
    ),
)
