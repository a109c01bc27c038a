"""The frame: arrays as bytes, and back."""
