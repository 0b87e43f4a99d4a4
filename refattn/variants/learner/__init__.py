"""A state that is a model, trained on the sequence as it is read; and states in levels."""
