"""Use cases: what the commands do, as functions from a typed request to a typed result.

They raise typed errors and report through a progress callback; they print nothing and read no environment variables.
"""
