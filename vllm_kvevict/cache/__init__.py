"""Where kept tokens live: plans, pages, page tables and compaction. Pure tensors, no vLLM."""
