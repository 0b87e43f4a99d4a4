"""factor * x: a scale that the state takes in with its keys, so that it counts in the normaliser too (mLSTM)."""


def apply(x, factor):
    return factor * x


def slope(x, factor):
    return factor + 0.0 * x
