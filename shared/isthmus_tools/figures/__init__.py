"""Drawings: cuts of a graph, fidelity of codecs, plans. The only place that imports matplotlib."""
