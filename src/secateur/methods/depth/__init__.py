"""Methods that remove whole blocks."""
