"""The whole of it as operators have it: server, database, workers, browser. Slow."""
