"""Experts of mixtures: which stay, and what the others leave to them."""
