"""influence_dot on CUDA: document scores and group sums in one kernel, token scores in another. No atomics anywhere.

T tokens, D documents, I inputs, O outputs, A targets, G groups. G_d = sum over tokens of dy_t x_t^T [O, I] lives in
registers, one tile at a time. Products of float32 take three TF32 products (tf32x3), which keeps float32's accuracy on
tensor cores; bfloat16 is multiplied as it is and added in float32.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _influence_dot_fwd_kernel(
    x,  # [T, I]
    dy,  # [T, O]
    offsets,  # [D + 1]
    order,  # [D] documents sorted by group
    group_offsets,  # [G + 1] into order
    targets,  # [A, O, I]
    precondition,  # [O, I]
    partial,  # [tiles, D, A]
    sums,  # [G, O, I]
    O,
    I,
    A,
    D,
    target_size,  # O * I, which may need 64 bits
    stride_x,
    stride_dy,
    HAS_TARGETS: tl.constexpr,
    HAS_PRECONDITION: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)  # the document itself, where there are no sums
    tiles_i = tl.cdiv(I, BLOCK_I)
    rows = (tile // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    cols = (tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    inside = (rows < O)[:, None] & (cols < I)[None, :]
    at = rows[:, None] * I + cols[None, :]  # [BLOCK_O, BLOCK_I]
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    begin_of, end_of = group, group + 1
    if HAS_SUMS:
        begin_of, end_of = tl.load(group_offsets + group), tl.load(group_offsets + group + 1)
    for k in range(begin_of, end_of):
        document = k
        if HAS_SUMS:
            document = tl.load(order + k)
        last = tl.load(offsets + document + 1)
        grad = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for begin in range(tl.load(offsets + document), last, BLOCK_T):
            tokens = begin + tl.arange(0, BLOCK_T).to(tl.int64)
            in_document = tokens < last
            x_block = tl.load(
                x + tokens[:, None] * stride_x + cols[None, :], in_document[:, None] & (cols < I)[None, :], 0.0
            )  # [BLOCK_T, BLOCK_I]
            dy_block = tl.load(
                dy + tokens[None, :] * stride_dy + rows[:, None], in_document[None, :] & (rows < O)[:, None], 0.0
            )  # [BLOCK_O, BLOCK_T]
            if UPCAST:
                x_block = x_block.to(tl.float32)
                dy_block = dy_block.to(tl.float32)
            grad = tl.dot(dy_block, x_block, grad, input_precision="tf32x3")
        total += grad
        if HAS_TARGETS:
            if HAS_PRECONDITION:
                grad *= tl.load(precondition + at, inside, 0.0)
            target_at = targets + at
            for a in range(A):
                target = tl.load(target_at, inside, 0.0)
                target_at += target_size
                # Over both axes at once: two nested sums fail to compile for sm_100 in Triton 3.7.1.
                score = tl.sum(grad * target)
                tl.store(partial + (tile * D + document) * A + a, score)
    if HAS_SUMS:
        out = sums + group * O * I + at
        tl.store(out, tl.load(out, inside, 0.0) + total, inside)


@triton.jit
def _influence_dot_tokens_fwd_kernel(
    x,  # [T, I]
    dy,  # [T, O]
    targets,  # [A, O, I]
    scores,  # [T, A]
    T,
    O,
    I,
    A,
    stride_x,
    stride_dy,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    a = tl.program_id(1).to(tl.int64)
    score = tl.zeros([BLOCK_T], tl.float32)
    for first_row in range(0, O, BLOCK_O):
        rows = first_row + tl.arange(0, BLOCK_O).to(tl.int64)
        image = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)  # targets_a x_t
        for first_col in range(0, I, BLOCK_I):
            cols = first_col + tl.arange(0, BLOCK_I).to(tl.int64)
            x_block = tl.load(
                x + tokens[:, None] * stride_x + cols[None, :], (tokens < T)[:, None] & (cols < I)[None, :], 0.0
            )  # [BLOCK_T, BLOCK_I]
            target = tl.load(
                targets + (a * O + rows[None, :]) * I + cols[:, None], (rows < O)[None, :] & (cols < I)[:, None], 0.0
            )  # [BLOCK_I, BLOCK_O]
            # Targets stay float32, so x is raised to it here whatever its type.
            image = tl.dot(x_block.to(tl.float32), target, image, input_precision="tf32x3")
        dy_block = tl.load(
            dy + tokens[:, None] * stride_dy + rows[None, :], (tokens < T)[:, None] & (rows < O)[None, :], 0.0
        )  # [BLOCK_T, BLOCK_O]
        score += tl.sum(image * dy_block.to(tl.float32), 1)
    tl.store(scores + tokens * A + a, score, tokens < T)


def blocks(num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Choose (BLOCK_O, BLOCK_I): a side of LoRA's rank needs 16, the least that tl.dot takes."""
    if num_outputs <= 16:
        return 16, 128
    if num_inputs <= 16:
        return 128, 16
    return 64, 64


def block_t(num_outputs: int, num_inputs: int, element_size: int) -> int:
    """Choose BLOCK_T: a LoRA layer is read at the memory's rate only if much of it is on its way at a time."""
    return 256 // element_size if min(num_outputs, num_inputs) <= 16 else 32


def influence_dot(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    targets: torch.Tensor | None,
    precondition: torch.Tensor | None,
    groups: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> torch.Tensor:
    """Score documents [D, A] and add their gradients to `sums` [G, O, I] by group; see fastsft.ops.influence_dot."""
    x, dy = _same_type(x, dy)
    O, I, D = dy.shape[1], x.shape[1], offsets.shape[0] - 1
    A = 0 if targets is None else targets.shape[0]
    if sums is None or groups is None:
        num_groups, order, group_offsets = D, None, None
    else:
        num_groups = sums.shape[0]
        order = torch.argsort(groups, stable=True)
        bounds = torch.arange(num_groups + 1, device=x.device)
        group_offsets = torch.searchsorted(groups[order].contiguous(), bounds)
    block_o, block_i = blocks(O, I)
    tiles = triton.cdiv(O, block_o) * triton.cdiv(I, block_i)
    partial = torch.empty(tiles, D, A, device=x.device)  # every document is in one group: all is written
    if tiles * num_groups:
        _influence_dot_fwd_kernel[(tiles, num_groups)](
            *(x, dy, offsets.contiguous(), order, group_offsets),
            *(t if t is None else t.contiguous() for t in (targets, precondition)),
            *(partial, sums, O, I, A, D, O * I, x.stride(0), dy.stride(0)),
            HAS_TARGETS=targets is not None,
            HAS_PRECONDITION=precondition is not None,
            HAS_SUMS=sums is not None,
            # The interpreter takes bfloat16 for the integers that hold it; compiled code does not need this.
            UPCAST=not x.is_cuda,
            BLOCK_T=block_t(O, I, x.element_size()),
            BLOCK_O=block_o,
            BLOCK_I=block_i,
        )
    return partial.sum(0)


def influence_dot_tokens(x: torch.Tensor, dy: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score tokens: x [T, I], dy [T, O], targets [A, O, I] -> [T, A]."""
    x, dy = _same_type(x, dy)
    T, A = x.shape[0], targets.shape[0]
    scores = torch.zeros(T, A, device=x.device)
    block_o, block_i = blocks(dy.shape[1], x.shape[1])
    if T * A:
        _influence_dot_tokens_fwd_kernel[(triton.cdiv(T, 64), A)](
            *(x, dy, targets.contiguous(), scores, T, dy.shape[1], x.shape[1], A, x.stride(0), dy.stride(0)),
            BLOCK_T=64,
            BLOCK_O=min(block_o, 64),
            BLOCK_I=min(block_i, 64),
        )
    return scores


def _same_type(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dtype != dy.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        x, dy = x.float(), dy.float()
    return (m if m.stride(1) == 1 else m.contiguous() for m in (x, dy))
