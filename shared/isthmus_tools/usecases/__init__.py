"""Use cases of the commands, as functions from a typed request to a typed result.

Use cases raise typed errors and report through a progress callback; none prints or reads environment variables.
"""
