"""Passes that only attribute: each sample's own loss, its gradient shown to a sink, and no gradient kept anywhere."""

# B lines of a batch, T tokens of a line, N supervised tokens, V vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastsft.capturing import Capture, Documents
from fastsft.capturing.hooks import Sink
from fastsft.data import IGNORED, Row, collate, collate_packed, pack, told_labels

Loss = Literal["sum", "mean"]
Labels = Literal["rows", "sampled"]
# probabilities that exist at once where labels are sampled
_PROBABILITIES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How rows are put side by side, and what a sample's loss is."""

    # over a sample's supervised tokens
    loss: Loss = "sum"
    # padded tokens of a batch; a longer row makes a batch of its own
    max_tokens: int = 4096
    # documents end to end in one line of `max_tokens` instead of side by side; the model must tell documents apart by
    # position_ids alone, as those of transformers do
    packing: bool = False
    pad_id: int = 0
    # sketch with dropout, as in training
    dropout: bool = False
    # whose loss a supervised token carries: its row's label's, or that of one drawn from the model's own distribution
    # there, by `seed`, the row's source and id, and the token's place: whatever batch the row is in
    labels: Labels = "rows"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in ("sum", "mean"):
            raise ValueError(f"`loss` must be 'sum' or 'mean' over a sample's supervised tokens: got {self.loss!r}.")
        if self.labels not in ("rows", "sampled"):
            raise ValueError(f"`labels` must be 'rows' or 'sampled' from the model: got {self.labels!r}.")
        if self.max_tokens < 1:
            raise ValueError(f"`max_tokens` of a batch must be 1 or more: got {self.max_tokens}.")

    def plan(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Sort rows into batches of like lengths, longest first: what does not fit in memory fails at once."""
        for row in rows:
            if not any(label != IGNORED for label in row.labels[1:]):
                raise ValueError(
                    f"row {row.id!r} of source {row.source!r} has no supervised token after its first, so it has no "
                    f"loss to attribute. Leave it out, or tokenise it with a larger `max_length`."
                )
        if self.packing:
            widest = max((len(row.input_ids) for row in rows), default=0)
            return [[rows[at] for at in line] for line in pack(rows, max(self.max_tokens, widest), seed=0)]
        batches: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: -len(row.input_ids)):
            if not batches or len(batches[-1][0].input_ids) * (len(batches[-1]) + 1) > self.max_tokens:
                batches.append([])
            batches[-1].append(row)
        return batches


@contextmanager
def attribution_only(
    model: nn.Module, sink: Sink, *, extra: Sequence[str] = (), dropout: bool = False
) -> Iterator[Capture]:
    """Follow the trainable layers of `model` with every parameter frozen, in eval mode; put both back afterwards."""
    capture = Capture(model, sink=sink, weight_grads="none", extra=extra)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.train(dropout)
        yield capture
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        capture.close()


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as a model takes them. `counts` [B * T]: which tokens have a supervised one of their document after them.
    `draws` [B, T]: uniform numbers by which labels are sampled, where they are."""

    inputs: dict[str, Tensor]
    labels: Tensor  # [B, T]
    weights: Tensor  # [B, T] of each label's loss
    documents: Documents
    counts: Tensor
    draws: Tensor | None = None


def make_batch(rows: Sequence[Row], batching: Batching, device: torch.device) -> Batch:
    """Lay rows side by side or end to end; `inputs`, `documents` and `counts` go to the device."""
    if batching.packing:
        length = sum(len(row.input_ids) for row in rows)
        inputs = collate_packed([rows], length, batching.pad_id)
        documents = Documents.packed(inputs.pop("lengths"), length)
    else:
        inputs = collate(rows, batching.pad_id)
        # Tokens that predict the next see no later ones, so none sees the padding on the right; without a dense mask
        # attention takes its causal kernel (index build of full weights: 2 to 4 % less, rough).
        del inputs["attention_mask"]
        documents = Documents.rows(*inputs["input_ids"].shape)
    labels = inputs.pop("labels")
    weights, counts = torch.ones(labels.shape), torch.zeros(labels.shape, dtype=torch.bool)
    draws = torch.zeros(labels.shape, dtype=torch.float64) if batching.labels == "sampled" else None
    for row, start in zip(rows, documents.offsets[:-1].tolist(), strict=True):
        supervised = [at for at, label in enumerate(row.labels) if at and label != IGNORED]
        counts.view(-1)[start : start + supervised[-1]] = True
        if batching.loss == "mean":
            weights.view(-1)[start : start + len(row.labels)] = 1 / len(supervised)
        if draws is not None:
            draws.view(-1)[start : start + len(row.labels)] = _draws(row, batching.seed)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return Batch(inputs, labels, weights, documents.to(device), counts.flatten().to(device), draws)


def _draws(row: Row, seed: int) -> Tensor:
    """A uniform number in [0, 1) for each token of a row."""
    key = hashlib.blake2b(f"{seed}:{row.source}:{row.id}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.rand(len(row.labels), generator=generator, dtype=torch.float64)


def run_batch(model: nn.Module, capture: Capture, batch: Batch) -> None:
    """Send one batch forward and backward: the capture's sink sees each document's gradient of its own loss."""
    with torch.enable_grad(), capture.batch(batch.documents):
        _summed_loss(model, batch).backward()


def _summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum weights[b, t] * -log p(labels[b, t]) over supervised t > 0."""
    places = (batch.labels[:, 1:] != IGNORED).nonzero()  # [N, 2]: logits at t predict the label at t + 1
    lines, columns = places.to(batch.inputs["input_ids"].device).unbind(1)
    with told_labels(batch.labels), head_sees(model, lines, columns) as gathered:
        logits = model(**batch.inputs, use_cache=False).logits
    logits = logits[0] if gathered else logits[lines, columns]  # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    def at(each: Tensor) -> Tensor:
        return each[:, 1:][places[:, 0], places[:, 1]].to(logits.device)

    wanted = at(batch.labels) if batch.draws is None else _sampled(logits.detach(), at(batch.draws))
    losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
    return losses @ at(batch.weights).to(losses)


def _sampled(logits: Tensor, draws: Tensor) -> Tensor:
    """Draw a label of each row of logits [N, V] by its uniform number -> [N]: the first whose share of the probability,
    with all before it, is above the number."""
    found = []
    step = max(1, _PROBABILITIES // logits.shape[1])
    for some, draw in zip(logits.split(step), draws.split(step), strict=True):
        shares = some.double().softmax(1).cumsum(1)
        labels = torch.searchsorted(shares, draw[:, None] * shares[:, -1:], right=True).squeeze(1)
        found.append(labels.clamp_(max=logits.shape[1] - 1))
    return torch.cat(found)


@contextmanager
def head_sees(model: nn.Module, lines: Tensor, columns: Tensor) -> Iterator[list[bool]]:
    """Hand the output embedding only the hidden states of given tokens: prompts and padding need no logits.

    The list that is yielded is no longer empty once it did so; it stays empty for a model that names no such layer.
    """
    get_head = getattr(model, "get_output_embeddings", None)  # peft's models pass it on
    head = get_head() if callable(get_head) else None
    gathered: list[bool] = []

    def gather(module: nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gathered.append(True)
        return (hidden[0][lines, columns][None], *hidden[1:])

    handle = None if head is None else head.register_forward_pre_hook(gather)
    try:
        yield gathered
    finally:
        if handle is not None:
            handle.remove()
