"""Data as tensors: data sets, batches, windows of text, images, and how a model is run on them."""
