"""How many tokens every layer and head keeps: one file per allocator. Importing this package registers them."""

from vllm_kvevict.budgets import adakv, cake, fixed, global_, lava, pyramid, uniform  # noqa: F401  # they register themselves
from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator, round_to_pages

__all__ = ["ALLOCATORS", "BudgetAllocator", "round_to_pages"]
