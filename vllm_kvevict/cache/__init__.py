"""Where kept tokens live: plans, pages, page tables, selection and compaction. Pure tensors, no vLLM."""
