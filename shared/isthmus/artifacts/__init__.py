"""The documents of a bundle as typed structs; no input or output."""
