"""Split learning: the edge trains the head, the cloud the rest; activations and gradients cross as frames."""
