"""Profiles of a model on a device: measured on its future function, stored in the registry."""
