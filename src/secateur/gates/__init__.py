"""Learnable masks: gates over tensors, losses that shape them, explicit conversion to keep-masks. Knows no model."""
