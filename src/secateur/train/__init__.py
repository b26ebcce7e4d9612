"""Training under masks. The engine for sparsity during training has its room here."""
