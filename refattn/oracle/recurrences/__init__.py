"""A recurrence as the judge evaluates it, right or wrong: apart from definitions and engines, so that it can be wrong on purpose.

    lowered    from a problem and its `Recurrence` to arrays of one shape
    running    those arrays token by token: values, worst errors, and values with roundings made larger

Tests hold it against the definition of every variant that has a recurrence.
"""
