"""``python -m vllm_kvevict``: ``inspect`` an eviction, ``calibrate`` budgets, list the ``policies``."""

from __future__ import annotations

from vllm_kvevict.commands.main import main

if __name__ == "__main__":
    main()
