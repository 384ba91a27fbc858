"""Sketching inside a training step, and passes that only attribute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.aims import Measured, aim, race
from benchmarks.system.in_run import make_model
from fastsft import ops
from fastsft.capturing import Capture, Documents
from fastsft.sketch import SketchSpec

BATCH, LENGTH, VOCABULARY, LAYERS = 8, 256, 1024, 2
SPEC = SketchSpec(size=4096)
SHAPE = f"Llama hidden 512, {LAYERS} layers, vocabulary {VOCABULARY}, {BATCH} x {LENGTH} tokens, float32"


class Trainee:
    """A copy of the model, one batch, and a training step; with `sketching`, its backward pass sketches every row."""

    def __init__(self, model: nn.Module, *, sketching: bool, weight_grads: str = "sink") -> None:
        self.model = copy.deepcopy(model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)
        self.documents = Documents.rows(BATCH, LENGTH)
        self.sketches = torch.zeros(BATCH, SPEC.size)
        self.keeps_grads = weight_grads == "sink"
        self.capture: Capture | None = None
        if sketching:
            self.capture = Capture(self.model, sink=self.sink, weight_grads=weight_grads)  # type: ignore[arg-type]
            self.seeds = [SPEC.layer_seed(layer.name) for layer in self.capture.layers]

    def sink(self, index: int, x: Tensor, dy: Tensor, documents: Documents) -> Tensor | None:
        grad = torch.zeros(dy.shape[1], x.shape[1]) if self.keeps_grads else None
        ops.sample_grad_project(
            x, dy, documents.offsets, SPEC.size, seed=self.seeds[index], out=self.sketches, weight_grad=grad
        )
        return grad

    def backward(self) -> None:
        if self.capture is None:
            self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
            return
        self.sketches.zero_()
        with self.capture.batch(self.documents):
            self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def sketching_step(*, lora: bool) -> Measured:
    model = make_model(512, LAYERS, VOCABULARY, lora=lora)
    ours, plain = Trainee(model, sketching=True), Trainee(model, sketching=False)
    return race(ours.step, plain.step, repeats=7, warmup=2, facts={"shape": SHAPE})


@aim("step_full_sjlt", what="training step, full weights, sketches of every row", against="the step", at_most=1.06)
def step_full_sjlt() -> Measured:
    return sketching_step(lora=False)


@aim(
    "step_lora_sjlt", what="LoRA r=16 step, exact gradients and sketches of every row", against="the step", at_most=1.08
)
def step_lora_sjlt() -> Measured:
    return sketching_step(lora=True)


@aim("pass_only", what="attribution-only pass with sketches", against="forward and backward of training", at_most=0.85)
def pass_only() -> Measured:
    model = make_model(512, LAYERS, VOCABULARY, lora=False)
    ours = Trainee(model, sketching=True, weight_grads="none")
    assert ours.capture is not None
    for parameter in ours.model.parameters():
        parameter.requires_grad_(False)  # the layers are followed all the same; nothing else forms a gradient
    plain = Trainee(model, sketching=False)

    def forward_and_backward() -> None:
        plain.backward()
        plain.optimizer.zero_grad()

    attribute: Callable[[], None] = ours.backward
    return race(attribute, forward_and_backward, repeats=7, warmup=2, facts={"shape": SHAPE})
