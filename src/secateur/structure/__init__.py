"""What can be removed from a model: weight matrices, stacks of blocks; later the axis algebra."""
