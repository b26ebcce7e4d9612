"""Whole jobs: prune with everything around it, and reproduce a method's claims."""
