"""Certified attention: every number correctly rounded, or enclosed by a proven bound.

`certify` is the ladder; `trusted` says what its bounds rest on.  This room shares no arithmetic with the engine or the oracle, so that they can be
checked against it.
"""
