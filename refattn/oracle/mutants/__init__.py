"""Executable mistakes: the specification with one or more of its readings changed."""
