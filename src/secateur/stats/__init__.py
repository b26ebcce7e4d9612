"""Statistics of activations and gradients, gathered block by block."""
