"""Methods whose score is a dot product: a query's gradient, turned by what the method knows, with each sample's.

    score(i, q) = sum over checkpoints of share * <P g_q, g_i>

g_i: gradient of sample i's loss summed over its response tokens; g_q: of the query's loss in nats per response token;
P symmetric, the method's own, of each checkpoint. P is applied to the queries once, then every sample's gradient is
contracted with them in its backward pass: no sample's gradient is kept.
"""

# N samples, Q queries, C checkpoints, D documents of a batch, O outputs, I inputs of a layer

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.attribution.methods._base import Moments, Per, Queries, Targets
from fastsft.attribution.methods._checkpoints import Checkpoint, load, present, restored, shares
from fastsft.attribution.methods._dots import Dots
from fastsft.attribution.methods._scores import Block, Scores
from fastsft.capturing import Documents, Layer
from fastsft.data import Row
from fastsft.sketch.passes import Batching, attribution_only, make_batch, run_batch

# of each followed layer, by parameter name, one matrix a query [Q, O, I]
Directions = Mapping[str, Tensor]
Turn = Callable[[Directions], Directions]


class GradientMethod:
    """Base of the dot-product methods: each says by `turn` what P is at a checkpoint.

    The trainable linear layers are followed. batching: how samples are put side by side; it changes no score, but for
    rounding. direction_bytes: of the turned query gradients that exist at once; more queries are scored in blocks, each
    a pass over the samples.
    """

    name = ""
    unit = ""

    def __init__(self, *, batching: Batching | None = None, direction_bytes: int = 2**31) -> None:
        self.batching = Batching() if batching is None else batching
        self.direction_bytes = direction_bytes

    def fit(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        samples: Sequence[Row],
        optimizer_state: Sequence[Moments] | None = None,
    ) -> Self:
        """Remember the samples, and learn P at every checkpoint."""
        self.model, self.samples = model, list(samples)
        self.checkpoints = list(checkpoints) or [present(model)]
        self.shares = shares(self.checkpoints)
        if optimizer_state is not None and len(optimizer_state) != len(self.checkpoints):
            raise ValueError(
                f"`optimizer_state` must hold one state a checkpoint: got {len(optimizer_state)} for "
                f"{len(self.checkpoints)} checkpoints."
            )
        self.turns: list[Turn] = []
        with restored(model):
            for number, checkpoint in enumerate(self.checkpoints):
                load(model, checkpoint)
                self.turns.append(self.turn(None if optimizer_state is None else optimizer_state[number]))
        return self

    def turn(self, moments: Moments | None) -> Turn:
        """Learn P from `self.samples` at the weights that `self.model` has now; identity unless told."""
        return lambda directions: directions

    def query_directions(self, queries: Queries) -> Directions:
        """What `turn`'s map is given at the model's weights: the gradient of every query's loss."""
        return query_gradients(self.model, queries, self.batching)

    def score(self, targets: Targets, *, per: Per = "sample") -> Scores:
        """Score every sample (and token) for every query."""
        queries = Queries.of(targets)
        fitted = copy.copy(self)  # scores are computed when asked for: by then this object may be fitted anew
        return Scores.of(self, self.samples, queries.names, lambda: fitted._blocks(queries, per))

    def _blocks(self, queries: Queries, per: Per) -> Iterator[Block]:
        step = self._queries_at_once()
        for first in range(0, len(queries), step):
            part = Queries(queries.names[first : first + step], queries.rows[first : first + step])
            yield from self._block_of(part, first, per)

    def _queries_at_once(self) -> int:
        size = sum(_bytes(layer.weight) for layer in followed(self.model))
        return max(1, self.direction_bytes // max(1, size * len(self.checkpoints)))

    def _block_of(self, queries: Queries, first: int, per: Per) -> Iterator[Block]:
        directions = []
        with restored(self.model):
            for checkpoint, turn in zip(self.checkpoints, self.turns, strict=True):
                load(self.model, checkpoint)
                directions.append(turn(self.query_directions(queries)))
        for batches in chunks(self.batching.plan(self.samples), self.samples):
            # between blocks the model is the caller's: an iteration may stop, or run beside another
            with restored(self.model):
                block = self._add(batches, directions, first, per)
            yield block

    def _add(self, batches: list[list[int]], directions: list[Directions], first: int, per: Per) -> Block:
        """Sum one chunk's scores over the checkpoints."""
        rows = [[self.samples[at] for at in batch] for batch in batches]
        values: Tensor | None = None
        tokens: list[Tensor] | None = None
        for checkpoint, share, direction in zip(self.checkpoints, self.shares, directions, strict=True):
            load(self.model, checkpoint)
            found, of_tokens = self.contract(rows, direction, per)
            values = share * found if values is None else values + share * found
            if per == "token":
                parts = [share * part for part in of_tokens]
                tokens = parts if tokens is None else [a + b for a, b in zip(tokens, parts, strict=True)]
        assert values is not None
        return Block([place for batch in batches for place in batch], first, values, tokens)

    def contract(
        self, batches: Sequence[Sequence[Row]], directions: Directions, per: Per
    ) -> tuple[Tensor, list[Tensor]]:
        """Dot each row's gradient at the model's weights with `directions` -> [n, Q], and of each row [T, Q]."""
        return contract(self.model, batches, directions, self.batching, per)


def followed(model: nn.Module) -> list[Layer]:
    """Find the layers that gradient methods follow."""
    with attribution_only(model, lambda *_: None) as capture:
        return list(capture.layers)


def chunks(plan: Sequence[Sequence[Row]], samples: Sequence[Row], batches: int = 16) -> Iterator[list[list[int]]]:
    """Cut a plan into groups of batches, rows as places in `samples`: weights change once a checkpoint and group."""
    places = numbered(plan, samples)
    for start in range(0, len(places), batches):
        yield places[start : start + batches]


def numbered(plan: Sequence[Sequence[Row]], rows: Sequence[Row]) -> list[list[int]]:
    """Name each row of a plan of `rows` by its place among them; a row that occurs n times has n places."""
    waiting: dict[int, list[int]] = {}
    for place in reversed(range(len(rows))):
        waiting.setdefault(id(rows[place]), []).append(place)
    return [[waiting[id(row)].pop() for row in batch] for batch in plan]


def query_gradients(model: nn.Module, queries: Queries, batching: Batching) -> dict[str, Tensor]:
    """The gradient of every query's loss, in nats per response token, at the model's weights: {name: [Q, O, I]}."""
    summed = Batching(max_tokens=batching.max_tokens, packing=batching.packing, pad_id=batching.pad_id)
    rows = [row for group in queries.rows for row in group]
    number = [number for number, group in enumerate(queries.rows) for _ in group]
    sums: dict[int, Tensor] = {}
    groups = torch.zeros(0, dtype=torch.int64)

    def sink(index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        sums[index] = _added(sums.get(index), x, dy, documents, groups, len(queries))

    with attribution_only(model, sink) as capture:
        device = capture.layers[0].weight.device
        for places in numbered(summed.plan(rows), rows):
            groups = torch.tensor([number[place] for place in places], device=device)
            run_batch(model, capture, make_batch([rows[place] for place in places], summed, device))
        layers = list(capture.layers)
    tokens = torch.tensor(queries.tokens, device=device)[:, None, None]
    return {layers[index].name: sums[index].div_(tokens) for index in sorted(sums)}


def _added(total: Tensor | None, x: Tensor, dy: Tensor, documents: Documents, groups: Tensor, num: int) -> Tensor:
    found = ops.influence_dot(x, dy, documents.offsets, groups=groups, num_groups=num, sums=total).sums
    assert found is not None
    return found


def _bytes(weight: Tensor) -> int:
    """Of one direction, which is float32 at least."""
    return weight.numel() * torch.promote_types(weight.dtype, torch.float32).itemsize


class Contracted(NamedTuple):
    """Of n rows their dots [n, Q], their tokens' [T, Q] where asked for, and their squared norms [n] where asked for;
    on the CPU."""

    values: Tensor
    tokens: list[Tensor]
    squares: Tensor | None


def contract(
    model: nn.Module, batches: Sequence[Sequence[Row]], directions: Directions, batching: Batching, per: Per = "sample"
) -> tuple[Tensor, list[Tensor]]:
    """Dot each row's gradient with each direction -> [n, Q] in the order of the batches, on the CPU, and where asked
    for of each row its tokens' shares [T, Q] (else an empty list)."""
    return contracted(model, batches, Dots(directions, per), batching)[:2]


def contracted(model: nn.Module, batches: Sequence[Sequence[Row]], dots: Dots, batching: Batching) -> Contracted:
    """Send batches through the model and gather what `dots` finds, in their order."""
    values: list[Tensor] = []
    tokens: list[Tensor] = []
    squares: list[Tensor] = []
    with attribution_only(model, dots) as capture:
        dots.layers = capture.layers
        for batch in batches:
            dots.begin()
            made = make_batch(batch, batching, capture.layers[0].weight.device)
            run_batch(model, capture, made)
            if dots.values is None:
                raise ValueError(
                    f"no direction is of a layer that the backward pass reached: they are of "
                    f"{', '.join(list(dots.directions)[:3])} ... Are they of this model?"
                )
            found = dots.values.cpu()
            if dots.per == "token":
                starts = made.documents.offsets.tolist()
                pieces = [found[at : at + len(row.input_ids)] for at, row in zip(starts, batch)]
                tokens += pieces
                found = torch.stack([piece.sum(0) for piece in pieces])
            values.append(found)
            if dots.squares is not None:
                squares.append(dots.squares.cpu())
    return Contracted(torch.cat(values), tokens, torch.cat(squares) if squares else None)
