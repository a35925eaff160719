"""How one prompt is evicted: what is kept, in which order, by whom."""
