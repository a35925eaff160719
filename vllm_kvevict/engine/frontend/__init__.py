"""What runs in the API server, or in the process of ``LLM``."""
