"""The only folder that imports vLLM: a room for each process, and beside them the modules that they share."""
