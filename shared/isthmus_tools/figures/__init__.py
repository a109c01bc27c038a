"""Figures of cuts, fidelity and plans; the only importer of matplotlib."""
