"""Example models and photos, from packages."""
