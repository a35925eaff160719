"""Slots are given once, taken back, and found again for any batch."""

import random

import pytest

from vllm_kvevict.cache.request_slots import RequestSlots


def test_slots_of_requests_that_come_and_go():
    rng, slots, owned = random.Random(0), RequestSlots(5), {}
    for step in range(300):
        if owned and (len(owned) == 5 or rng.random() < 0.5):
            req_id = rng.choice(list(owned))
            assert slots.give_back(req_id)
            del owned[req_id]
        else:
            owned[f"r{step}"] = slots.take(f"r{step}")
        assert len(set(owned.values())) == len(owned) == len(slots)
        batch = [*rng.sample(list(owned), rng.randint(0, len(owned))), "unknown"]
        assert slots.of(batch).tolist() == [owned.get(req_id, -1) for req_id in batch]
        assert slots.of(batch) is slots.of(list(batch))  # found once
        assert all(req_id in slots and slots[req_id] == slot for req_id, slot in owned.items())


def test_a_slot_is_taken_once_and_given_back_once():
    slots = RequestSlots(2)
    slots.take("a")
    with pytest.raises(ValueError, match="req_id: 'a' has a slot already"):
        slots.take("a")
    slots.take("b")
    with pytest.raises(ValueError, match="req_id: no slot left for 'c', all 2 are in use"):
        slots.take("c")
    assert slots.give_back("a")
    assert not slots.give_back("a")
    assert slots.take("c") in (0, 1)
