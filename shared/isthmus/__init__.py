"""Isthmus: split inference as a bundle of serverless functions."""

__version__ = "0.1.0"
