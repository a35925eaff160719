"""Engines that our commands run."""
