"""From what people send to what a model takes, and back: images to arrays, logits to classes."""
