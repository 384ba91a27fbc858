"""sample_grad_project: a sketch of each document's gradient from a layer's inputs and output gradients, in one pass.

A linear layer y = x W^T with weight [O, I] has, for document d, the gradient G_d = sum over its tokens of dy_t x_t^T.
What is sketched of it is the `kind`:

    sjlt        the blocked sparse JL sketch of the whole G_d (`sketch_matrix`): error 1 / sqrt(K) whatever its rank
    factored    x and dy sketched to 256 numbers a token first, then the sketch of their product: cheaper on wide layers
    kronecker   P_o G_d P_i^T with dense random signs (LoGra, arXiv 2405.13954), to compare with
"""

# T tokens, D documents, I inputs, O outputs, K sketch size

from typing import Literal

import torch
from torch import Tensor

from fastsft.ops import _cuda, _project
from fastsft.ops._op import Implementation, Op, why_no_cpp
from fastsft.ops._project_sides import kronecker_sides
from fastsft.ops._project_sjlt import Job
from fastsft.ops._register import register
from fastsft.ops._rules import buffer_for, check_offsets, check_one_device, check_targets, check_tokens
from fastsft.ops._sjlt import check_sketch_size

KINDS = ("sjlt", "factored", "kronecker")


def sample_grad_project(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    size: int = 4096,
    *,
    kind: Literal["sjlt", "factored", "kronecker"] = "sjlt",
    seed: int = 0,
    precondition: Tensor | None = None,
    out: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> Tensor:
    """Sketch each document's gradient: x [T, I], dy [T, O], offsets [D + 1] -> [D, K], float32 (float64 for float64).

    Document d is the tokens offsets[d] <= t < offsets[d + 1]; tokens outside belong to none. Sketches of one kind, size
    and 32-bit `seed` of one weight are comparable: inner products are kept in the mean over seeds.

    precondition [O, I], of kind "sjlt" alone: sketch precondition * G_d.
    out [D, K] is added to and returned; its K counts, not `size`.
    weight_grad [O, I] is added to: the sum of G_d over the documents, raw. Of kind "sjlt" it costs almost nothing, as
        each G_d is formed anyway: a backward pass that returns it need not form the weight's gradient itself. In the
        type of the sketches; on CUDA also bfloat16, if x and dy are.

    No kind holds a whole [D, O, I]: on a CPU tiles of G_d pass through the L1, elsewhere bounded chunks of rows.
    float32 and narrower inputs are added up in float32. Results carry no gradient.
    """
    x, dy = x.detach(), dy.detach()
    check_tokens(x, dy, offsets)
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}: got {kind!r}.")
    if precondition is not None and kind != "sjlt":
        raise ValueError(
            f"`precondition` cannot be applied by kind {kind!r}, which sees x and dy and never their product: "
            f"use kind='sjlt', or leave the preconditioner out."
        )
    O, I, D = dy.shape[1], x.shape[1], offsets.shape[0] - 1
    check_targets(None, precondition, O, I)
    check_one_device(x, dy=dy, offsets=offsets, precondition=precondition)
    size = size if out is None else out.shape[-1]
    if kind == "kronecker":
        kronecker_sides(size, O, I)
    else:
        check_sketch_size(size)
    out = buffer_for("out", out, (D, size), x)
    if weight_grad is not None:
        # A GPU's training in bfloat16 has weight gradients in bfloat16.
        narrow = x.is_cuda and x.dtype == dy.dtype == weight_grad.dtype == torch.bfloat16
        weight_grad = buffer_for("weight_grad", weight_grad, (O, I), x, torch.bfloat16 if narrow else None)
    factor = None if precondition is None else precondition.to(out.dtype)
    add_projections(x, dy, offsets, kind, factor, weight_grad, out, seed)
    return out


_OP = Op(
    "sample_grad_project",
    _project.run_reference,
    [
        Implementation(
            backend="cpp",
            device="cpu",
            run=_project.run_cpp,
            why_absent=why_no_cpp,
            note="kronecker is plain GEMMs: torch's",
        ),
        Implementation(
            backend="cuda",
            device="cuda",
            run=_project.run_cuda,
            why_absent=_cuda.why_no_library,
            note="products are torch's GEMMs, and the kernel sketches them",
        ),
    ],
)


@register("sample_grad_project", mutates_args=("weight_grad", "out"))
def add_projections(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    kind: str,
    precondition: Tensor | None,
    weight_grad: Tensor | None,
    out: Tensor,
    seed: int,
) -> None:
    """Add the documents' sketches to `out` [D, K], and the sum of their gradients to `weight_grad` [O, I]."""
    check_offsets(offsets, x.shape[0])
    _OP(Job(x, dy, offsets, kind, precondition, weight_grad, out, seed), like=x)


@add_projections.register_fake
def _(*_: object) -> None:
    return None
