"""Leakage at cuts: attackers that reconstruct a model's inputs from boundary tensors, and their success."""
