"""What codecs learn from inputs, and what was measured of their answers: tables, fidelity, its bounds."""
