"""``python -m vllm_kvevict``: see what an eviction keeps (``inspect``), and which policies there are (``policies``)."""

from __future__ import annotations

from vllm_kvevict.command import main

if __name__ == "__main__":
    main()
