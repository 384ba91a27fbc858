"""See each followed layer's input and output gradient during the backward pass, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.capturing.documents import Documents
from fastsft.capturing.layers import Layer, find_layers

Sink = Callable[[int, Tensor, Tensor, Documents], None]


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward shows (x, dy) to the capture.

    The input is a saved tensor of this node, so gradient checkpointing recomputes it as it does any other, and
    it is seen once however often the forward pass runs.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, capture: Capture, index: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.capture, ctx.index = capture, index
        device = output.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        # under autocast the layer multiplied a rounded copy of x: the same rounding gives the same gradient
        ctx.capture._see(ctx.index, x if ctx.dtype is None else x.to(ctx.dtype), grads[0])
        return grads[0], None, None, None


class Capture:
    """Follow the trainable linear layers of a model: `sink(layer_index, x [T,I], dy [T,O], documents)`.

    Only forward and backward passes inside `batch(...)` are seen. Outputs and gradients are the same bits with
    and without it.
    """

    def __init__(self, model: nn.Module, *, sink: Sink | None = None) -> None:
        self.layers: list[Layer] = find_layers(model)
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no trainable linear layer to follow. "
                f"Unfreeze some weights, or add adapters (peft.get_peft_model) before attaching."
            )
        self.sink = sink
        self._documents: Documents | None = None
        self._handles = [
            layer.module.register_forward_hook(self._hook(index)) for index, layer in enumerate(self.layers)
        ]

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._documents is None or not output.requires_grad:
                return None
            return _Tap.apply(output, inputs[0].detach(), self, index)

        return hook

    def _see(self, index: int, x: Tensor, dy: Tensor) -> None:
        documents = self._documents
        if documents is None:
            raise RuntimeError(
                "a backward pass reached a followed layer outside `capture.batch(...)`: call `loss.backward()` "
                "inside the same `with` block as the forward pass."
            )
        x2, dy2 = self.layers[index].factors(x, dy)
        if len(x2) != documents.num_tokens:
            raise ValueError(
                f"{self.layers[index].name} saw {len(x2)} tokens, the documents of this batch cover "
                f"{documents.num_tokens}. Does something reshape the batch between the collator and the model?"
            )
        if self.sink is not None:
            self.sink(index, x2, dy2, documents)

    @contextmanager
    def batch(self, documents: Documents) -> Iterator[None]:
        """See the forward and backward pass of one micro-batch made of these documents."""
        self._documents = documents
        try:
            yield
        finally:
            self._documents = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


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
