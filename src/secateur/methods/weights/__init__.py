"""Methods that remove single weights, any network."""
