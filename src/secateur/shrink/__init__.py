"""Making a plan real: masks, removal of blocks, saving and loading."""
