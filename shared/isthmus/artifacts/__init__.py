"""What the documents of a bundle say, as types; no input or output."""
