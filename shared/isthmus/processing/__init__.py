"""Pre- and post-processing: images to a model's inputs, logits to classes."""
