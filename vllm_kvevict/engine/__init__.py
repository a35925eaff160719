"""The only folder that imports vLLM: flags, spec and manager, scheduler, worker, attention backends, metrics."""
