"""Linear attention in NumPy by prefix sums of features, and fifteen mistakes as one stage replaced each.

Names begin with the fault's number in the project's catalogue; arithmetic is float32 whatever the operands are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refattn.candidate import Candidate

F32 = np.float32


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def relu(x):
    return np.maximum(x, 0)


def as_it_is(x):
    return x


def grouped(x, heads):
    return np.repeat(x, heads // x.shape[1], axis=1)


def tiled(x, heads):
    return np.tile(x, (1, heads // x.shape[1]) + (1,) * (x.ndim - 2))


@dataclass(frozen=True)
class Stages:
    """What a kernel of linear attention is made of."""

    variant: str = "linear"
    query_map: Callable = elu_plus_one
    key_map: Callable = elu_plus_one
    group: Callable = grouped
    divided: Callable = lambda summed, total, seen: summed / np.where(total != 0, total, F32(1))
    total: Callable = lambda mass, eps: mass + F32(eps)
    seen: Callable = lambda causal: causal
    ahead: int = 0  # further keys that a query sees
    sums: Callable = lambda features: np.cumsum(features, axis=2, dtype=F32)  # of keys, along tokens
    initial: Callable = lambda x: x


@np.errstate(all="ignore")
def attend(stages, q, k, v, initial_state=None, initial_mass=None, eps=1e-6, causal=False):
    kept, heads, n_q, n_k = v.dtype, q.shape[1], q.shape[2], k.shape[2]
    q, k, v = (x.astype(F32) for x in (q, k, v))
    phi_q, phi_k = stages.query_map(q), stages.key_map(k)
    states = np.cumsum(phi_k[..., :, None] * v[..., None, :], axis=2, dtype=F32)
    masses = stages.sums(phi_k)
    nothing = np.zeros_like(states[:, :, :1]) if n_k else np.zeros((*k.shape[:2], 1, k.shape[3], v.shape[3]), F32)
    states, masses = np.concatenate([nothing, states], axis=2), np.concatenate([nothing[..., 0], masses], axis=2)
    if initial_state is not None:
        states = states + stages.initial(initial_state.astype(F32))[:, :, None]
    if initial_mass is not None:
        masses = masses + stages.initial(initial_mass.astype(F32))[:, :, None]
    after = np.arange(n_q) + n_k - n_q + 1 + stages.ahead if stages.seen(causal) else np.full(n_q, n_k)
    after = np.clip(after, 0, n_k)
    summed = np.einsum("bhtk,bhtkv->bhtv", phi_q, stages.group(states[:, :, after], heads))
    mass = np.einsum("bhtk,bhtk->bht", phi_q, stages.group(masses[:, :, after], heads))
    out = stages.divided(summed, stages.total(mass, eps)[..., None], after[:, None])
    return out.astype(kept), states[:, :, -1], masses[:, :, -1]


def candidate(stages, name="planted"):
    return Candidate(
        name,
        lambda operands, params: attend(stages, **operands, **params),
        frozenset({"q", "k", "v", "initial_state", "initial_mass"}),
        frozenset({"eps", "causal"}),
        returns=("out", "state", "mass"),
        variant=stages.variant,
    )


RIGHT = {"linear": Stages(), "relu_linear": Stages("relu_linear", relu, relu)}


def by_chunks(width):
    """Sums that begin anew every so many tokens."""

    def sums(features):
        found = [np.cumsum(features[:, :, at : at + width], axis=2, dtype=F32) for at in range(0, features.shape[2], width)]
        return np.concatenate(found, axis=2) if found else features

    return sums


def unit_maximum(summed, total, seen):
    return summed


_RELU = RIGHT["relu_linear"]

#: Name -> kernel; the first word is its code.
FAULTS = {
    "D19 relu for elu + 1": Stages(query_map=relu, key_map=relu),
    "D19 elu without the one": Stages(query_map=elu, key_map=elu),
    "D19 no map on queries": Stages(query_map=as_it_is),
    "D19 no map on keys": Stages(key_map=as_it_is),
    "D19 exp for elu + 1": Stages(query_map=np.exp, key_map=np.exp),
    "D19 relu on keys only": Stages(key_map=relu),
    "D2 not normalised": Stages(divided=unit_maximum),
    "D2 divided by the number of keys": Stages(divided=lambda summed, total, seen: summed / np.maximum(seen, 1)),
    "D2 no eps": Stages(total=lambda mass, eps: mass),
    "D2 divisor clamped": Stages(total=lambda mass, eps: np.maximum(mass, F32(eps))),
    "M3 always causal": Stages(seen=lambda causal: True),
    "M3 never causal": Stages(seen=lambda causal: False),
    "M3 one key of the future": Stages(ahead=1),
    "H1 heads tiled": Stages(group=tiled),
    "D18 initial state ignored": Stages(initial=lambda x: 0 * x),
    "D1 normaliser's sum restarts": Stages(sums=by_chunks(16)),
    "D19 no map": replace(_RELU, query_map=as_it_is, key_map=as_it_is),
    "D19 elu + 1 for relu": replace(_RELU, query_map=elu_plus_one, key_map=elu_plus_one),
}
