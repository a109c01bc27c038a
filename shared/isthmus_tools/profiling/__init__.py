"""What one device takes for one model: measured on the function that will run it, and kept in the registry."""
