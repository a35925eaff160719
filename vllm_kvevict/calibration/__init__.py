"""How much of each prompt must stay: ``--kv-budget auto``, and ``python -m vllm_kvevict calibrate`` that fits it."""
