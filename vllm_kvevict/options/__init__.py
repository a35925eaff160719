"""The table of options, their names and texts; an operator's limits on requests; old names of a policy's options."""
