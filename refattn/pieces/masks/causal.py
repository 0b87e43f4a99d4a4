"""Causal mask: query i sits at position i + offset among the keys, and sees itself and the past."""


def allows(b, h, i, j, offset):
    return j <= i + offset


def span(i, n_keys, offset):
    return 0 * i, i + offset + 1
