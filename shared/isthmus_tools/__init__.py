"""Isthmus's tools: import, cut, calibrate, profile, plan and run split models on an engineer's machine."""
