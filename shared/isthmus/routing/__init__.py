"""The choice of a request's route, and the fallback of its codecs."""
