"""Methods that remove single weights of block stacks, layer by layer."""
