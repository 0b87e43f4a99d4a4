"""Which query-key pairs may interact.

``allows(b, h, i, j, *numbers) -> bool`` says whether query i of head h sees key j; ``span(i, n_keys, *numbers) -> (first, last)`` is the
half-open range of keys outside which it surely sees none, for scalars or arrays of i, so that whole tiles can be skipped.
"""
