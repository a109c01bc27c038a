"""Early exits of classifiers: pooled activations, a ridge head, a confidence, and a threshold with a bound on its risk.

Nothing is trained by gradients: each step has a closed form or is a convex problem of a few variables.
"""
