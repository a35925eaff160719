"""``python -m vllm_kvevict inspect``: see what an eviction keeps."""

from __future__ import annotations

from vllm_kvevict.inspector.command import main

if __name__ == "__main__":
    main()
