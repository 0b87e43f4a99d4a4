"""One attention variant per file; each file ends in ``VARIANT = Variant(...)``."""
