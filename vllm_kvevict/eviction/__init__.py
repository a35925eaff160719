"""The eviction of one request: at the end of its prompt, between chunks or while its answer grows, or token by token."""
