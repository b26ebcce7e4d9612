"""Channels, neurons and heads of any network, cut out through the structure engine."""
