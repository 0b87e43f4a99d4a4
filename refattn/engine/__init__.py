"""The fast CPU backend: one kernel per family and pass.  It sees plans and arrays, never variants.

simd       vectors as Numba values
panels     register-blocked products of a tile of keys or values with a panel of queries
forward    family `scored`, forward
run        from a checked problem to a kernel and back
"""
