"""The engine of `state` and `feature` variants: one recurrence of a matrix per head, in three forms that agree."""
