"""How a query and a key become a score.

``score(q, k, *weights)`` takes one query row and one key row.  ``amplitude(q, k, *weights)`` takes arrays of heads, rows and columns
(``... T D`` and ``... S D``) and returns, per query and key, the sum of the absolute values of the terms the score is a sum of: the
quantity its rounding error is proportional to.  ``roundings`` takes the
width (last axis) of q, of k and of each weight, and returns how many roundings the longest term goes through.
"""
