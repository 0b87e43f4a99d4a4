"""How a score changes before it is normalised: ``apply(s, *numbers)`` and its derivative ``slope(s, *numbers)``."""
