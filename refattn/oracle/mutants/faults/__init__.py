"""The faults that are known, a file per question a kernel answers wrongly; each file lists `MUTANTS` and `FAMILIES`."""
