"""A state of fixed size that fades, is corrected and written, and is read once per token."""
