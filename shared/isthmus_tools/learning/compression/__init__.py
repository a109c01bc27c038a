"""Compression of a segment for the edge: variants that take and give the segment's own tensors, measured before use."""
