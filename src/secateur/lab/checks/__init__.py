"""Small-scale checks, one file per method, each with `check = Check(...)`."""
