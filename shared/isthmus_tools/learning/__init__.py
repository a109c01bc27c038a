"""Learning at the edge: labelled data, early exits, compression and training."""
