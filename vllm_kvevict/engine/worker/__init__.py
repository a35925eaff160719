"""What runs in a worker, beside the model."""
