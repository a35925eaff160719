"""Attention over evicted rows, a module for each backend of vLLM."""
