"""What variants are made of: a folder per question, a piece per file.

A piece is a few scalar functions with their derivatives.  It knows no array library but NumPy and no backend; a backend lifts it.
"""
