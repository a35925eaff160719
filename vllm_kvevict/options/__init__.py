"""The options of requests, and the limits that an operator sets on them; old names of a policy's options."""
