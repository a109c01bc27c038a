"""Sentence encoders: texts to vectors, read from sentence-transformers' folder layout."""
