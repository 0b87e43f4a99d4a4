"""-x: a rate of decay as the logarithm of a factor, and an erasure as a write."""


def apply(x):
    return -x


def slope(x):
    return -1.0 + 0.0 * x
