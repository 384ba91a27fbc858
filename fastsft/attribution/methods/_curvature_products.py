"""Exact derivatives of the loss along many vectors: Gauss-Newton products, and Hessian products that give every
token's inner product with the vectors at once."""

# Q vectors, P parameters, n supervised tokens of a batch, V vocabulary, D documents

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsft.data import IGNORED, told_labels
from fastsft.sketch.passes import Batch, head_sees


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and attention on the one kernel with a second derivative; put both back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True, eq=False)
class Predictions:
    """A batch's supervised tokens: logits [n, V] in float32 at least, labels [n], and their losses' weights [n].

    documents [n]: the row of the batch that each belongs to; places [n]: the label's place in that row.
    """

    logits: Tensor
    labels: Tensor
    weights: Tensor
    documents: Tensor
    places: Tensor

    def losses(self) -> Tensor:
        """Return -log p of every label [n]."""
        return nn.functional.cross_entropy(self.logits, self.labels, reduction="none")


def predict(model: nn.Module, batch: Batch) -> Predictions:
    """Run `model` forward; the output embedding sees supervised tokens only."""
    device = batch.inputs["input_ids"].device
    supervised = (batch.labels[:, 1:] != IGNORED).nonzero().to(device)  # [n, 2]: logits at t predict the label at t + 1
    lines, columns = supervised.unbind(1)
    with told_labels(batch.labels), head_sees(model, lines, columns) as gathered:
        logits = model(**batch.inputs, use_cache=False).logits
    logits = logits[0] if gathered else logits[lines, columns]
    labels, weights = (each.to(device)[lines, columns + 1] for each in (batch.labels, batch.weights))
    flat = lines * batch.labels.shape[1] + columns
    documents = torch.searchsorted(batch.documents.offsets, flat, right=True) - 1
    places = flat + 1 - batch.documents.offsets[documents]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return Predictions(logits, labels, weights.to(logits), documents, places)


def ggn_products(
    model: nn.Module, parameters: Sequence[Tensor], batch: Batch, vectors: Sequence[Tensor], most_bytes: int
) -> list[Tensor]:
    """Multiply the Gauss-Newton matrix of the batch's summed loss, J^T B J, with Q vectors.

    vectors: of each parameter [Q, *its shape] -> the same shapes. J: derivative of the logits; B = weight * (diag(p) -
    p p^T), the softmax's own Hessian. J v is the derivative of J^T u by u (double backward): transformers' forward
    code runs once, and nothing in it is differentiated forward. Costs a backward pass and its derivative a vector.
    """
    found = predict(model, batch)
    cotangent = torch.zeros_like(found.logits, requires_grad=True)
    pulled = torch.autograd.grad(found.logits, parameters, cotangent, create_graph=True, allow_unused=True)
    known = [place for place, each in enumerate(pulled) if each is not None]
    at_once = vectors_at_once(model, batch, len(found.labels), most_bytes)
    p = found.logits.detach().softmax(-1)
    totals = [torch.zeros_like(vector) for vector in vectors]
    for part in _slices(len(vectors[0]), at_once):
        tangents = _backward([pulled[k] for k in known], [cotangent], [vectors[k][part] for k in known])[0]  # [q, n, V]
        tangents = p * (tangents - (p * tangents).sum(-1, keepdim=True)) * found.weights[:, None]
        for total, product in zip(totals, _backward([found.logits], parameters, [tangents])):
            total[part] = product
    return totals


def hessian_products(
    model: nn.Module, parameters: Sequence[Tensor], batch: Batch, vectors: Sequence[Tensor], most_bytes: int
) -> tuple[list[Tensor], Tensor, Predictions]:
    """Multiply the Hessian of the batch's summed loss with Q vectors -> of each parameter [Q, *its shape].

    The loss is written as sum_j w_j loss_j with w = 1, so that the same double backward pass also gives the derivative
    of <gradient, vector> by w: every supervised token's <gradient of its loss, vector> [Q, n], over all parameters.
    """
    found = predict(model, batch)
    ones = torch.ones_like(found.weights, requires_grad=True)
    gradient = torch.autograd.grad(found.losses() @ ones, parameters, create_graph=True, allow_unused=True)
    known = [place for place, each in enumerate(gradient) if each is not None]
    at_once = vectors_at_once(model, batch, len(found.labels), most_bytes)
    totals = [torch.zeros_like(vector) for vector in vectors]
    dots = ones.new_zeros(len(vectors[0]), len(ones))
    for part in _slices(len(dots), at_once):
        *products, dots[part] = _backward(
            [gradient[k] for k in known], [*parameters, ones], [vectors[k][part] for k in known]
        )
        for total, product in zip(totals, products):
            total[part] = product
    return totals, dots, found


def vectors_at_once(model: nn.Module, batch: Batch, supervised: int, most_bytes: int) -> int:
    """How many vectors one batched backward pass takes: what it holds at a time should fit `most_bytes`, roughly.

    On a CPU one: 8 vectors batched took twice the time of 8 passes (4 M model, 8 rows of 96 tokens; their tensors stay
    in the caches).
    """
    ids = batch.inputs["input_ids"]
    if ids.device.type == "cpu":
        return 1
    config = getattr(model, "config", None)
    heads, vocabulary = (getattr(config, name, 1) for name in ("num_attention_heads", "vocab_size"))
    widest = max((m.out_features for m in model.modules() if isinstance(m, nn.Linear)), default=1)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # a dozen tensors of the widest layer, as many attention maps and four of the logits exist at a time
    numbers = 12 * ids.numel() * (min(widest, 2**15) + heads * ids.shape[1]) + 4 * supervised * vocabulary + parameters
    return max(1, most_bytes // (numbers * next(model.parameters()).element_size()))


def _slices(number: int, at_once: int) -> list[slice]:
    return [slice(first, min(first + at_once, number)) for first in range(0, number, at_once)]


def _backward(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Send q vectors (of each output [q, *its shape]) backward -> of each input [q, *its shape]; the graph stays."""
    number = len(vectors[0])
    batched = number > 1
    grads = torch.autograd.grad(
        outputs,
        inputs,
        vectors if batched else [vector[0] for vector in vectors],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    return [
        x.new_zeros(number, *x.shape) if grad is None else (grad if batched else grad[None])
        for x, grad in zip(inputs, grads, strict=True)
    ]
