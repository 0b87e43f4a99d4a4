"""One attention variant per file, in a folder for each family; each file ends in ``VARIANT = Variant(...)``."""
