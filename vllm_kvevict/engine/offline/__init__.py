"""Engines in the process of one of our commands."""
