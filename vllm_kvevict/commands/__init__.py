"""The commands of ``python -m vllm_kvevict``."""
