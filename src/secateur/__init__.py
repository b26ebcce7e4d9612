"""secateur: remove whatever a deep-learning system can do without, and show what it cost."""
