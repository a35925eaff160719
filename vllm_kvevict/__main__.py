"""``python -m vllm_kvevict``: ``check`` a machine, ``inspect`` evictions, ``calibrate`` budgets, list ``policies``."""

from __future__ import annotations

from vllm_kvevict.commands.main import main

if __name__ == "__main__":
    main()
