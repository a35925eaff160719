"""What runs in the engine core."""
