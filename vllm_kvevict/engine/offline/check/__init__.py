"""What ``kvevict check`` tries with engines, one process each."""
