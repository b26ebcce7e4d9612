"""Budgets spread over sites: pure functions from sizes to integer counts of kept units."""
