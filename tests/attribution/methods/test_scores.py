"""Scores gather what blocks give, whatever the order of the blocks, and whether ids repeat or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsft.attribution.methods import Block, Scores

MATRIX = torch.tensor(
    [[3.0, -1.0, 0.5], [2.0, 4.0, -6.0], [3.0, 0.0, 0.5], [-5.0, 4.0, 1.0], [0.0, -2.0, 2.0]], dtype=torch.float64
)
IDS = ["a", "b", "c", "d", "e"]
SOURCES = ["red", "blue", "red", "blue", "red"]


def _scores(matrix: Tensor = MATRIX, ids: list[str] = IDS, *, tokens: bool = False, order: int = 1) -> Scores:
    """Blocks of two samples and two queries, in one order or the other."""
    pieces = [(rows, first) for first in (0, 2) for rows in ([0, 3], [4, 1], [2])][::order]

    def blocks():
        for rows, first in pieces:
            values = matrix[rows, first : first + 2]
            parts = [torch.stack([0.25 * value, 0.75 * value]) for value in values] if tokens else None
            yield Block(rows, first, values, parts)

    return Scores("made up", "none", ids, SOURCES, ["x", "y", "z"], blocks)


@pytest.mark.parametrize("order", [1, -1])
def test_the_matrix_holds_every_block_in_its_place(order: int) -> None:
    assert torch.equal(_scores(order=order).matrix(), MATRIX)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("top", [1, 2, 4, 5])
def test_the_summary_is_the_sorted_matrix(top: int, order: int) -> None:
    found = _scores(order=order).summary(top)
    for query, column in enumerate(MATRIX.T):
        places = sorted(range(5), key=lambda row: (-float(column[row]), row))[:top]
        assert found.top.largest_rows[query].tolist() == places
        assert torch.equal(found.top.largest[query], column[places])
        places = sorted(range(5), key=lambda row: (float(column[row]), row))[:top]
        assert found.top.smallest_rows[query].tolist() == places
        assert torch.equal(found.top.smallest[query], column[places])
    assert torch.allclose(found.by_source["red"], MATRIX[[0, 2, 4]].sum(0))
    assert torch.allclose(found.by_source["blue"], MATRIX[[1, 3]].sum(0))


def test_places_beyond_the_samples_are_minus_one() -> None:
    top = _scores().summary(7).top
    assert (top.largest_rows[:, 5:] == -1).all()
    assert (top.smallest_rows[:, 5:] == -1).all()
    assert (top.largest_rows[:, :5] >= 0).all()


@pytest.mark.parametrize("order", [1, -1])
def test_tokens_are_put_together_across_blocks_of_queries(order: int) -> None:
    found = _scores(tokens=True, order=order).tokens()
    assert set(found) == set(IDS)
    for row, id in enumerate(IDS):
        assert torch.equal(found[id], torch.stack([0.25 * MATRIX[row], 0.75 * MATRIX[row]]))


def test_equal_ids_keep_rows_of_their_own() -> None:
    scores = _scores(ids=["a", "b", "a", "d", "a"], tokens=True)
    assert torch.equal(scores.matrix(), MATRIX)
    assert scores.summary(1).top.largest_rows.tolist() == [[0], [1], [4]]
    with pytest.raises(ValueError, match="'a' names several samples"):
        scores.tokens()


def test_no_samples_is_an_empty_matrix_and_tokens_must_be_asked_for() -> None:
    empty = Scores("made up", "none", [], [], ["x", "y"], lambda: iter(()))
    assert empty.matrix().shape == (0, 2)
    assert (empty.summary(2).top.largest_rows == -1).all()
    with pytest.raises(ValueError, match="per='token'"):
        _scores().tokens()
