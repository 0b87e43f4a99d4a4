"""Functions of one number: ``apply(x, *numbers)`` and the derivative ``slope(x, *numbers)``, of NumPy functions, so that x may be an array."""
