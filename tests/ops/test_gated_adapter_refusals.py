"""Bad input of gated_adapter is a sentence."""

import pytest
import torch

from fastsft import ops


def bad(**change):
    told = {"x": torch.ones(6, 4), "a": torch.ones(11, 4), "b": torch.ones(5, 8), "num_experts": 3, "rank": 2}
    return told | change


def of_tasks(**change):
    sequences = ops.Sequences.packed(torch.tensor([0, 2, 6]), torch.ones(6, dtype=torch.bool))
    told = {"a": torch.ones(8, 4), "per": "task", "task": torch.tensor([0, 1]), "table": torch.ones(2, 3)}
    return bad(**(told | {"sequences": sequences} | change))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (bad(num_experts=0), "`num_experts` and `rank` must be at least 1: got 0 and 2"),
        (bad(rank=0), "`num_experts` and `rank` must be at least 1: got 3 and 0"),
        (bad(a=torch.ones(44)), r"`x` \[.., I\] and `a` \[P, I\] must have the same I.*and \[44\]"),
        (bad(x=torch.ones(4)), r"must have the same I: got \[4\] and"),
        (bad(x=torch.ones(6, 5)), r"must have the same I: got \[6, 5\] and \[11, 4\]"),
        (bad(b=torch.ones(40)), r"`b` \[O, E \* rank \+ M\] must have 3 x 2 columns.*got \[40\]"),
        (bad(b=torch.ones(5, 5)), r"must have 3 x 2 columns.*got \[5, 5\]"),
        (bad(num_frozen=4), "`num_frozen` must be between 0 and the 3 experts: got 4"),
        (bad(num_frozen=-1), "`num_frozen` must be between 0 and the 3 experts: got -1"),
        (bad(a=torch.ones(8, 4)), r"3 x 2 rows of experts \+ 2 of the memory.* \+ 3 of the router, 11 in all: got 8"),
        (of_tasks(a=torch.ones(11, 4)), r"beyond its experts\), 8 in all: got 11"),
        (bad(gate="hard"), "`gate` must be one of sigmoid, softmax, topk, one_hot: got 'hard'"),
        (bad(per="layer"), "`per` must be 'token', 'sequence' or 'task': got 'layer'"),
        (bad(gate="one_hot"), "gate 'one_hot' is the task's own expert, so `per` must be 'task': got 'token'"),
        (bad(gate="topk", top_k=0), "`top_k` must be between 1 and the 3 experts: got 0"),
        (bad(gate="topk", top_k=4), "`top_k` must be between 1 and the 3 experts: got 4"),
        (bad(bias=torch.ones(2)), r"`bias` must be \[3\], a number an expert: got \[2\]"),
        (of_tasks(gate="one_hot", table=None, bias=torch.ones(3)), "gate 'one_hot' has no logits, so `bias` would do"),
        (of_tasks(task=torch.tensor(0)), r"`task` must be a vector of numbers, \[D\] or \[1\]: got the shape \[\]"),
        (bad(per="sequence"), "gates per sequence need `sequences`"),
        (of_tasks(x=torch.ones(7, 4)), "`sequences` must cover the 7 tokens of `x`: they cover 6"),
        (of_tasks(task=None), "gates per task need `task`"),
        (of_tasks(table=None), "and `table`.*unless the gate is 'one_hot'"),
        (of_tasks(task=torch.tensor([0, 1, 1])), "one a sequence with `sequences` given: got 3 tasks for 2 sequences"),
        (of_tasks(sequences=None), "with `sequences` given: got 2 tasks for 0 sequences"),
        (of_tasks(table=torch.ones(2, 4)), r"`table` must be \[N, 3\], a logit an expert of each task: got \[2, 4\]"),
        (of_tasks(table=torch.ones(3)), r"`table` must be \[N, 3\].*got \[3\]"),
    ],
)
def test_bad_input_is_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.gated_adapter(**arguments)


def test_the_arguments_that_are_made_bad_are_good():
    assert ops.gated_adapter(**bad()).shape == (6, 5)
    assert ops.gated_adapter(**of_tasks()).shape == (6, 5)
