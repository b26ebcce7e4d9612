"""Methods that lower the rank of weights."""
