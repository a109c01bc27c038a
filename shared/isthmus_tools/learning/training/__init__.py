"""Training: data from files and brokers to a network, its evaluation, and a graph to publish."""
