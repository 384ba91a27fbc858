"""The parts of gated_adapter that are not plain products: gates, the epilogue between the two, both products with dy.

Each has its reference here, in torch. Where nobody asks for a backend by name, CUDA takes the epilogue's Triton kernels
and the vendor's products.
"""

# T tokens, D sequences, I inputs, O outputs, E experts, R = E * rank, M memory rank

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsft.ops._op import Implementation, Op, why_no_triton

Gate = Literal["sigmoid", "softmax", "topk", "one_hot"]


def gate_values(logits: Tensor, gate: str, top_k: int) -> Tensor:
    """Turn logits [..., E] into gates; `topk` is the softmax over the `top_k` largest, the others are 0."""
    if gate == "sigmoid":
        return torch.sigmoid(logits)
    if gate == "topk":
        index = logits.topk(top_k, dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, logits.gather(-1, index))
    # along columns: torch's softmax of short rows is 8 times as slow on a CPU (T=2048, E=4)
    return torch.softmax(logits.movedim(-1, 0), dim=0).movedim(0, -1)


def gate_gradient(dg: Tensor, g: Tensor, gate: str) -> Tensor:
    """Turn gradients of gates into gradients of logits. Of `topk` it is that of the chosen experts, others get 0."""
    if gate == "sigmoid":
        return dg * g * (1 - g)
    return g * (dg - (dg * g).sum(-1, keepdim=True))


class Epilogue(NamedTuple):
    """What stands between z = x A^T and the product with B.

    gates [D, E] are values, of which a token takes row document[t] (document None: D is T, or 1 for all tokens); with
    `gate` they are logits [T, E], which the epilogue turns into values.
    """

    z: Tensor  # [T, R + M]
    gates: Tensor  # [D, E] or [T, E], float32 at least
    document: Tensor | None  # [T]
    gate: str | None
    top_k: int


def _by_expert(matrix: Tensor, num_experts: int, width: int) -> Tensor:
    """View the experts' columns [T, R] as [T, E, rank]."""
    return matrix[:, :width].unflatten(1, (num_experts, width // num_experts))


def _of_tokens(g: Tensor, document: Tensor | None, like: Tensor) -> Tensor:
    g = g if document is None else g[document]
    return g.to(like.dtype)[:, :, None]  # [T or 1, E, 1]


def _forward_reference(job: Epilogue, width: int) -> tuple[Tensor, Tensor]:
    g = job.gates if job.gate is None else gate_values(job.gates, job.gate, job.top_k)
    E = g.shape[1]
    if E == 0:
        return job.z, g
    if job.z.shape[1] == width:
        return (_by_expert(job.z, E, width) * _of_tokens(g, job.document, job.z)).flatten(1), g
    if torch.compiler.is_compiling():
        scaled = _by_expert(job.z, E, width) * _of_tokens(g, job.document, job.z)
        return torch.cat([scaled.flatten(1), job.z[:, width:]], 1), g
    h = torch.empty(job.z.shape, dtype=job.z.dtype, device=job.z.device)
    torch.mul(_by_expert(job.z, E, width), _of_tokens(g, job.document, job.z), out=_by_expert(h, E, width))
    h[:, width:] = job.z[:, width:]
    return h, g


def _backward_reference(job: Epilogue, dh: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`job.gates` are values here, and `job.gate` says whether the second result is the gradient of their logits."""
    g, E = job.gates, job.gates.shape[1]
    if E == 0:
        return dh, g.new_zeros(len(dh), 0)
    wide = torch.promote_types(dh.dtype, torch.float32)
    dg = (_by_expert(dh, E, width) * _by_expert(job.z, E, width)).sum(2, dtype=wide)  # [T, E]
    scaled = (_by_expert(dh, E, width) * _of_tokens(g, job.document, dh)).flatten(1)
    dz = scaled if dh.shape[1] == width else torch.cat([scaled, dh[:, width:]], 1)
    return dz, dg if job.gate is None else gate_gradient(dg, g, job.gate)


def _forward_triton(job: Epilogue, width: int) -> tuple[Tensor, Tensor]:
    from fastsft.triton_kernels import gated_adapter as kernels

    return kernels.epilogue(job.z, job.gates, job.document, width, job.gate, job.top_k)


def _backward_triton(job: Epilogue, dh: Tensor, width: int) -> tuple[Tensor, Tensor]:
    from fastsft.triton_kernels import gated_adapter as kernels

    return kernels.epilogue_backward(dh, job.z, job.gates, job.document, width, job.gate)


_FORWARD = Op(
    "gated_epilogue",
    _forward_reference,
    [Implementation(backend="triton", device="cuda", run=_forward_triton, why_absent=why_no_triton)],
)
_BACKWARD = Op(
    "gated_epilogue_backward",
    _backward_reference,
    [Implementation(backend="triton", device="cuda", run=_backward_triton, why_absent=why_no_triton)],
)


def epilogue(job: Epilogue, width: int) -> tuple[Tensor, Tensor]:
    """Scale z's experts' columns [T, width] by their gates; memory passes -> (h [T, R + M], gate values)."""
    return _run(_FORWARD, job, width, like=job.z)


def epilogue_backward(job: Epilogue, dh: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """dh [T, R + M] -> (dz [T, R + M], gradient of the token's gates, or of their logits, [T, E])."""
    return _run(_BACKWARD, job, dh, width, like=job.z)


def _products_reference(dy: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return dy @ b, dy.T @ h


def _products_triton(dy: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    from fastsft.triton_kernels import gated_adapter as kernels

    return kernels.products(dy, b, h)


_PRODUCTS = Op(
    "gated_products",
    _products_reference,
    [
        Implementation(
            backend="triton",
            device="cuda",
            run=_products_triton,
            why_absent=why_no_triton,
            by_name=True,
            note="where it is asked for by name, up to rank 32; else the vendor's two products",
        )
    ],
)


def products(dy: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Both products that read dy: dy [T, O], b [O, R], h [T, S] -> (dh = dy b [T, R], dB = dy^T h [O, S])."""
    return _run(_PRODUCTS, dy, b, h, like=dy)


def _run(op: Op, *args: object, like: Tensor) -> tuple[Tensor, Tensor]:
    # a compiler fuses the reference by itself
    return op.reference(*args) if torch.compiler.is_compiling() else op(*args, like=like)
