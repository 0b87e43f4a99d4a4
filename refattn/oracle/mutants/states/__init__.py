"""Executable mistakes of recurrences: the data of a `Recurrence`, or the way it is run, with something changed.

`reading` says what can be read wrongly, `evaluation` what a kernel answers then and how far a correct computation of it may stray, `scope` in which
calls a mistake can show, and `faults` lists what real kernels got wrong.
"""
