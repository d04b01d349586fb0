"""Many requests at once: an engine whose sequences join and leave, and an HTTP server in front of it."""
