"""Soft-capping, cap * tanh(s / cap) (Gemma Team, "Gemma 2", arXiv:2408.00118, section 2)."""

import math


def apply(s, cap):
    return cap * math.tanh(s / cap)


def slope(s, cap):
    return 1.0 - math.tanh(s / cap) ** 2
