"""Importance criteria: pure functions of tensors, one number per unit, higher = keep."""
