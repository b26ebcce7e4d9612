"""Repair after removal: compensation in closed form, batch-norm statistics, fine-tuning under masks."""
