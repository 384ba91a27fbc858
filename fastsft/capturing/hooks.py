"""See each followed layer's input and output gradient during the backward pass, and change nothing but on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.capturing.documents import Documents
from fastsft.capturing.layers import Layer, find_layers
from fastsft.capturing.replace import autocast_dtype, replace_forward, restore_forward, rounded

# (layer index, x [T,I], dy [T,O], documents) -> the weight's gradient [O,I], read with weight_grads="sink" only
Sink = Callable[[int, Tensor, Tensor, Documents], Tensor | None]
WeightGrads = Literal["autograd", "sink", "none"]


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward shows (x, dy) to the capture.

    The input is a saved tensor of this node, so gradient checkpointing recomputes it as it does any other, and
    it is seen once however often the forward pass runs. `anchor`, where given, makes the output require a gradient
    although neither input nor weight does.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor | None, capture: Capture, index: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.capture, ctx.index = capture, index
        # under autocast a linear layer multiplied a rounded copy of x: the same rounding gives the same gradient
        ctx.dtype = autocast_dtype(output.device) if capture.layers[index].kind == "linear" else None
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.capture._see(ctx.index, rounded(x, ctx.dtype), grads[0])
        return grads[0], None, None, None, None


class Capture:
    """Follow the trainable linear layers of a model: `sink(layer_index, x [T,I], dy [T,O], documents)`.

    Only forward and backward passes inside `batch(...)` are seen. weight_grads says who forms followed weights'
    gradients meanwhile:

    "autograd": autograd, as always. Outputs and gradients are the same bits as without a capture.
    "sink": the sink returns them, as sums of the per-document products it formed anyway; autograd skips its own
        dy^T x, a third of a step's arithmetic. Layers in `extra` keep autograd's.
    "none": nobody; `.grad` of followed weights and their biases is left alone. For passes that only attribute.

    extra: see `find_layers`. An embedding's sink gets its dy [T,H] as x and the ids [T] as dy.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sink: Sink | None = None,
        weight_grads: WeightGrads = "autograd",
        extra: Sequence[str] = (),
    ) -> None:
        if weight_grads not in ("autograd", "sink", "none"):
            raise ValueError(f'`weight_grads` must be "autograd", "sink" or "none": got {weight_grads!r}.')
        if weight_grads == "sink" and sink is None:
            raise ValueError('weight_grads="sink" needs a `sink` that returns the gradients: got none.')
        self.layers: list[Layer] = find_layers(model, extra)
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no trainable linear layer to follow. "
                f"Unfreeze some weights, or add adapters (peft.get_peft_model) before attaching."
            )
        self.sink, self.weight_grads = sink, weight_grads
        self._documents: Documents | None = None
        self._anchor = torch.zeros((), device=self.layers[0].weight.device, requires_grad=True)
        self._replaced: list[Layer] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for index in range(len(self.layers)):
                self._follow(index)
        except ValueError:
            self.close()
            raise

    def _follow(self, index: int) -> None:
        layer = self.layers[index]
        if self.weight_grads == "sink" and layer.kind == "linear":
            replace_forward(self, index)
            self._replaced.append(layer)
        else:
            self._handles.append(layer.module.register_forward_hook(self._hook(index)))

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._documents is None or not torch.is_grad_enabled():
                return None
            if self.weight_grads == "none":
                return _Tap.apply(output, inputs[0].detach(), self._anchor, self, index)
            return _Tap.apply(output, inputs[0].detach(), None, self, index) if output.requires_grad else None

        return hook

    def _see(self, index: int, x: Tensor, dy: Tensor) -> Tensor | None:
        documents = self._documents
        if documents is None:
            raise RuntimeError(
                "a backward pass reached a followed layer outside `capture.batch(...)`: call `loss.backward()` "
                "inside the same `with` block as the forward pass."
            )
        # a backward pass called inside autocast must not round what is summed here
        with torch.autocast(dy.device.type, enabled=False):
            return self._show(index, *self.layers[index].factors(x, dy, documents.num_tokens), documents)

    def _show(self, index: int, x2: Tensor, dy2: Tensor, documents: Documents) -> Tensor | None:
        if len(x2) != documents.num_tokens:
            raise ValueError(
                f"{self.layers[index].name} saw {len(x2)} tokens, the documents of this batch cover "
                f"{documents.num_tokens}. Does something reshape the batch between the collator and the model?"
            )
        return None if self.sink is None else self.sink(index, x2, dy2, documents)

    @property
    def is_seeing(self) -> bool:
        """Whether a batch is open."""
        return self._documents is not None

    @contextmanager
    def batch(self, documents: Documents) -> Iterator[None]:
        """See the forward and backward pass of one micro-batch made of these documents."""
        frozen = self._freeze() if self.weight_grads == "none" else []
        self._documents = documents
        try:
            yield
        finally:
            self._documents = None
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _freeze(self) -> list[nn.Parameter]:
        parameters = [p for layer in self.layers for p in layer.module.parameters(recurse=False) if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        return parameters

    def close(self) -> None:
        """Leave every layer as it was found."""
        for handle in self._handles:
            handle.remove()
        for layer in self._replaced:
            restore_forward(layer)
        self._handles, self._replaced = [], []


class Captured:
    """What `capture(model)` gives: per-document gradients and their dot products with given directions.

    D documents, O x I a followed weight, A directions. `names` are the followed parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._capture = Capture(model, sink=self._take)
        self._factors: list[tuple[int, Tensor, Tensor, Documents]] = []
        self.names = [layer.name for layer in self._capture.layers]

    def _take(self, index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        self._factors.append((index, x, dy, documents))

    @contextmanager
    def batch(
        self,
        *,
        rows: tuple[int, int] | None = None,
        lengths: Sequence[Sequence[int]] | None = None,
        row_length: int = 0,
    ) -> Iterator[None]:
        """Capture the forward and backward pass inside the block; what an earlier block captured is forgotten.

        Either `rows=(B, T)`, one document a row, or `lengths` of the documents in each packed row and `row_length`.
        """
        if (rows is None) == (lengths is None):
            raise ValueError("give either `rows=(num_rows, row_length)` or `lengths=[[...], ...]` with `row_length`.")
        self._factors = []
        documents = Documents.rows(*rows) if rows is not None else Documents.packed(lengths or [], row_length)
        with self._capture.batch(documents.to(self._capture.layers[0].weight.device)):
            yield

    def document_grads(self) -> dict[str, Tensor]:
        """Materialise each document's gradient: {name: [D, O, I]}, of the loss as it was scaled."""
        grads: dict[str, Tensor] = {}
        for index, x, dy, documents in self._factors:
            grad = ops.document_grads(x, dy, documents.offsets)
            name = self.names[index]
            grads[name] = grads[name] + grad if name in grads else grad
        return grads

    def influence(self, targets: dict[str, Tensor], *, per: Literal["document", "token"] = "document") -> Tensor:
        """Dot every document's (or token's) gradient with each direction: {name: [A, O, I]} -> [D, A] or [T, A].

        Names that are missing from `targets` count as zero. No per-document gradient is stored.
        """
        total: Tensor | None = None
        for index, x, dy, documents in self._factors:
            name = self.names[index]
            if name not in targets:
                continue
            scores = ops.influence_dot(x, dy, documents.offsets, targets[name], per=per).scores
            if scores is not None:
                total = scores if total is None else total + scores
        if total is None:
            raise ValueError(
                f"nothing to dot: `targets` names {sorted(targets)[:3]}, the capture followed {self.names[:3]} ... "
                f"and saw {len(self._factors)} backward passes of layers."
            )
        return total


@contextmanager
def capture(model: nn.Module) -> Iterator[Captured]:
    """Follow the trainable linear layers of `model` in a training loop of your own."""
    captured = Captured(model)
    try:
        yield captured
    finally:
        captured._capture.close()
