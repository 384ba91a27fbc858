"""A small story: three tasks learnt one after another, an expert each and a memory, against one LoRA."""

import pytest

from benchmarks.system.forgetting import letters, race

SEEDS = range(5)


@pytest.fixture(scope="module")
def endings():
    setting = letters(steps=40)
    # rates that suit each (`python -m benchmarks.system.forgetting` looks for the best)
    return {
        arm: [race(arm, setting, seed, rate) for seed in SEEDS]
        for arm, rate in (("one LoRA", 3e-3), ("gated by task", 1e-2))
    }


def test_experts_and_memory_forget_less_than_one_lora_of_the_same_rank(endings):
    for gated, lora in zip(endings["gated by task"], endings["one LoRA"], strict=True):
        assert gated["first_at_the_end"] < lora["first_at_the_end"]
        assert gated["mean_at_the_end"] < lora["mean_at_the_end"]
        # both had something to forget
        for ending in (gated, lora):
            assert ending["first_when_learnt"] < ending["before"]["first"] - 0.3


def test_what_the_memory_goes_on_learning_costs_the_first_task_little(endings):
    for ending in endings["gated by task"]:
        assert abs(ending["first_at_the_end"] - ending["first_when_learnt"]) < 0.1
