"""Calibration: codec tables learned from inputs, and the fidelity of every codec measured on held-out inputs."""
