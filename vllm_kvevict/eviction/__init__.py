"""The eviction of one request: at the end of its prompt, between chunks, while its answer grows, token by token."""
