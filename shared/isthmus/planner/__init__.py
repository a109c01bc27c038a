"""Where a model is best cut, or that it is not: `search` divides, `profiling` measures devices, `planning` chooses."""
