"""One request along one route: the hops, and the only place that runs segments in order."""
