"""The options of requests, and the limits that an operator sets on them."""
