"""Sliding window: query i sits at position i + offset among the keys, and sees `left` keys before it, itself, and `right` after it."""


def allows(b, h, i, j, offset, left, right):
    return i + offset - left <= j <= i + offset + right


def span(i, n_keys, offset, left, right):
    return i + offset - left, i + offset + right + 1
