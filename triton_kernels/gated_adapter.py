"""gated_adapter on CUDA: the gate epilogue, its backward pass, both products with dy at once, products that skip.

T tokens, D sequences, I inputs, O outputs, E experts, R = E * rank, M memory rank, S columns of h.

The epilogue stands between z = x A^T and the product with B. A program holds a tile of tokens with the columns of all
experts [tokens, experts, rank], padded to powers of two by masks: gates meet their columns, and the gradient of a gate
is a sum over its own, without a second look at memory. No atomics anywhere, so every call gives the same bits.
"""

import torch
import triton
import triton.language as tl

TILE = 2048  # numbers a program of the epilogue holds at a time: 16 a thread, two loads of bfloat16
MOST_RANK = 32  # up to here the tiles of one pass over dy fit, see `products`
PROGRAMS = 512  # of `products`: enough to fill a GPU; a constant, so that sums do not depend on the machine


@triton.jit
def _gate_values(
    logits,  # [BLOCK_T, BLOCK_E]
    experts,  # [BLOCK_E]
    E: tl.constexpr,
    GATE: tl.constexpr,
    TOP_K: tl.constexpr,
):
    if GATE == "sigmoid":
        found = tl.sigmoid(logits)
    else:
        logits = tl.where((experts < E)[None, :], logits, float("-inf"))
        if GATE == "topk":
            # NaN comes before all others, as in torch, and so is not passed over
            left = tl.where(logits == logits, logits, float("inf"))
            chosen = left != left  # none yet
            for _ in range(TOP_K):
                best = left == tl.max(left, 1)[:, None]
                first = tl.min(tl.where(best, experts[None, :], E), 1)  # of equal logits the lowest expert
                taken = experts[None, :] == first[:, None]
                chosen = chosen | taken
                left = tl.where(taken, float("-inf"), left)
            logits = tl.where(chosen, logits, float("-inf"))
        parts = tl.exp(logits - tl.max(logits, 1)[:, None])
        found = parts / tl.sum(parts, 1)[:, None]
    return found


# Widths and strides are constants of the epilogue: of an argument a compiler learns at most that 16 divides it, and 8
# experts of rank 16 with their router leave rows of 136, which are read 16 bytes at a time all the same.
@triton.jit
def _gated_epilogue_fwd_kernel(
    z,  # [T, R + M]
    gates,  # [D, E], or logits [T, E]
    document,  # [T]
    h,  # [T, R + M]
    values,  # [T, E]
    T,
    stride_z: tl.constexpr,
    stride_gates: tl.constexpr,  # 0: one row for all tokens
    E: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,  # R + M
    HAS_DOCUMENT: tl.constexpr,
    GATE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    experts = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    is_token = tokens < T
    inside = is_token[:, None] & (experts < E)[None, :]
    row = tokens
    if HAS_DOCUMENT:
        row = tl.load(document + tokens, is_token, 0).to(tl.int64)
    g = tl.load(gates + row[:, None] * stride_gates + experts[None, :], inside, 0.0).to(tl.float32)
    if GATE is not None:
        g = _gate_values(g, experts, E, GATE, TOP_K)
        tl.store(values + tokens[:, None] * E + experts[None, :], g, inside)
    for first in range(0, RANK, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        column = (experts[:, None] * RANK + ranks[None, :])[None, :, :]  # [1, BLOCK_E, BLOCK_R]
        used = inside[:, :, None] & (ranks < RANK)[None, None, :]
        block = tl.load(z + tokens[:, None, None] * stride_z + column, used, 0.0)  # [BLOCK_T, BLOCK_E, BLOCK_R]
        tl.store(h + tokens[:, None, None] * WIDTH + column, block.to(tl.float32) * g[:, :, None], used)
    for first in range(E * RANK, WIDTH, BLOCK_M):
        memory = first + tl.arange(0, BLOCK_M)
        used = is_token[:, None] & (memory < WIDTH)[None, :]
        block = tl.load(z + tokens[:, None] * stride_z + memory[None, :], used, 0.0)  # [BLOCK_T, BLOCK_M]
        tl.store(h + tokens[:, None] * WIDTH + memory[None, :], block, used)


@triton.jit
def _gated_epilogue_bwd_kernel(
    dh,  # [T, R + M]
    z,  # [T, R + M]
    gates,  # [D, E] values, or values [T, E]
    document,  # [T]
    dz,  # [T, R + M]
    dgates,  # [T, E]
    T,
    stride_dh: tl.constexpr,
    stride_z: tl.constexpr,
    stride_gates: tl.constexpr,
    E: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    experts = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    is_token = tokens < T
    inside = is_token[:, None] & (experts < E)[None, :]
    row = tokens
    if HAS_DOCUMENT:
        row = tl.load(document + tokens, is_token, 0).to(tl.int64)
    g = tl.load(gates + row[:, None] * stride_gates + experts[None, :], inside, 0.0).to(tl.float32)
    dg = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for first in range(0, RANK, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        column = (experts[:, None] * RANK + ranks[None, :])[None, :, :]  # [1, BLOCK_E, BLOCK_R]
        used = inside[:, :, None] & (ranks < RANK)[None, None, :]
        grad = tl.load(dh + tokens[:, None, None] * stride_dh + column, used, 0.0).to(tl.float32)
        block = tl.load(z + tokens[:, None, None] * stride_z + column, used, 0.0).to(tl.float32)
        dg += tl.sum(grad * block, 2)
        tl.store(dz + tokens[:, None, None] * WIDTH + column, grad * g[:, :, None], used)
    if GATE == "sigmoid":
        dg = dg * g * (1 - g)
    elif GATE is not None:  # past the E experts g is 0
        dg = g * (dg - tl.sum(dg * g, 1)[:, None])
    tl.store(dgates + tokens[:, None] * E + experts[None, :], dg, inside)
    for first in range(E * RANK, WIDTH, BLOCK_M):
        memory = first + tl.arange(0, BLOCK_M)
        used = is_token[:, None] & (memory < WIDTH)[None, :]
        block = tl.load(dh + tokens[:, None] * stride_dh + memory[None, :], used, 0.0)  # [BLOCK_T, BLOCK_M]
        tl.store(dz + tokens[:, None] * WIDTH + memory[None, :], block, used)


@triton.jit
def _gated_products_bwd_kernel(
    dy,  # [T, O]
    b,  # [O, R]
    h,  # [T, S]
    dh,  # [stretches, T, R]
    db,  # [chunks, O, S]
    T,
    O,
    R,
    S,
    stretch,  # outputs a program, a multiple of BLOCK_O
    stride_dy,
    stride_b,
    stride_h,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    tokens = chunk * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_S)
    is_token = tokens < T
    h_block = tl.load(
        h + tokens[:, None] * stride_h + columns[None, :], is_token[:, None] & (columns < S)[None, :], 0.0
    )  # [BLOCK_T, BLOCK_S]
    if UPCAST:
        h_block = h_block.to(tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    begin = part * stretch
    for first in range(begin, tl.minimum(begin + stretch, O), BLOCK_O):
        rows = first + tl.arange(0, BLOCK_O)  # [BLOCK_O]
        is_row = rows < O
        dy_block = tl.load(
            dy + tokens[:, None] * stride_dy + rows[None, :], is_token[:, None] & is_row[None, :], 0.0
        )  # [BLOCK_T, BLOCK_O]
        b_block = tl.load(
            b + rows[:, None] * stride_b + ranks[None, :], is_row[:, None] & (ranks < R)[None, :], 0.0
        )  # [BLOCK_O, BLOCK_R]
        if UPCAST:
            dy_block = dy_block.to(tl.float32)
            b_block = b_block.to(tl.float32)
        total = tl.dot(dy_block, b_block, total, input_precision="tf32x3")
        outer = tl.dot(tl.trans(dy_block), h_block, input_precision="tf32x3")  # [BLOCK_O, BLOCK_S]
        to = db + (chunk * O + rows[:, None]) * S + columns[None, :]
        tl.store(to, outer, is_row[:, None] & (columns < S)[None, :])
    to = dh + (part * T + tokens[:, None]) * R + ranks[None, :]
    tl.store(to, total, is_token[:, None] & (ranks < R)[None, :])


@triton.jit
def _shrink_active_fwd_kernel(
    x,  # [T, I]
    a,  # [R, I]
    active,  # [tiles, E], see active_tiles
    z,  # [T, R]
    T,
    I,
    stride_x,
    stride_a,
    E: tl.constexpr,
    RANK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # The experts of a tile beside each other: what one has read of x is in the cache for the next.
    place = tl.program_id(0).to(tl.int64)
    listed = tl.load(active + place).to(tl.int64)
    expert = tl.where(listed < 0, -1 - listed, listed)
    tokens = (place // E) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = expert * RANK + ranks  # [BLOCK_R]
    is_token = tokens < T
    is_rank = ranks < RANK
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for first in range(0, tl.where(listed < 0, 0, I), BLOCK_I):
        cols = first + tl.arange(0, BLOCK_I)
        is_col = cols < I
        x_block = tl.load(
            x + tokens[:, None] * stride_x + cols[None, :], is_token[:, None] & is_col[None, :], 0.0
        )  # [BLOCK_T, BLOCK_I]
        a_block = tl.load(
            a + rows[None, :] * stride_a + cols[:, None], is_rank[None, :] & is_col[:, None], 0.0
        )  # [BLOCK_I, BLOCK_R]
        if UPCAST:
            x_block = x_block.to(tl.float32)
            a_block = a_block.to(tl.float32)
        total = tl.dot(x_block, a_block, total, input_precision="tf32x3")
    to = z + tokens[:, None] * (E * RANK) + rows[None, :]
    tl.store(to, total, is_token[:, None] & is_rank[None, :])


@triton.jit
def _expand_active_fwd_kernel(
    y,  # [T, O]
    h,  # [T, R]
    b,  # [O, R]
    active,  # [tiles, E], see active_tiles
    out,  # [T, O]
    scale,
    T,
    O,
    stride_y,
    stride_h,
    stride_b,
    E: tl.constexpr,
    RANK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # The outputs of a tile beside each other: they read the same rows of h.
    place = tl.program_id(0).to(tl.int64)
    blocks_o = tl.cdiv(O, BLOCK_O)
    tile = place // blocks_o
    tokens = tile * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    rows = (place % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    is_token = tokens < T
    is_row = rows < O
    slots = tl.arange(0, BLOCK_E)
    listed = tl.load(active + tile * E + slots, slots < E, -1)
    steps: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    # Active experts come first, so there is nothing to ask on the way.
    for step in range(0, tl.sum((listed >= 0).to(tl.int32), 0) * steps):
        expert = tl.load(active + tile * E + step // steps).to(tl.int64)
        ranks = (step % steps) * BLOCK_R + tl.arange(0, BLOCK_R)
        is_rank = ranks < RANK
        cols = expert * RANK + ranks  # [BLOCK_R]
        h_block = tl.load(
            h + tokens[:, None] * stride_h + cols[None, :], is_token[:, None] & is_rank[None, :], 0.0
        )  # [BLOCK_T, BLOCK_R]
        b_block = tl.load(
            b + rows[None, :] * stride_b + cols[:, None], is_row[None, :] & is_rank[:, None], 0.0
        )  # [BLOCK_R, BLOCK_O]
        if UPCAST:
            h_block = h_block.to(tl.float32)
            b_block = b_block.to(tl.float32)
        total = tl.dot(h_block, b_block, total, input_precision="tf32x3")
    inside = is_token[:, None] & is_row[None, :]
    before = tl.load(y + tokens[:, None] * stride_y + rows[None, :], inside, 0.0).to(tl.float32)
    tl.store(out + tokens[:, None] * O + rows[None, :], before + scale * total, inside)


def epilogue_blocks(num_experts: int, rank: int, memory: int) -> dict[str, int]:
    """Choose the tile of the epilogue: all experts, as much of their rank as fits, and then tokens."""
    block_e = triton.next_power_of_2(num_experts)
    block_r = min(triton.next_power_of_2(rank), max(1, TILE // block_e))
    block_t = max(1, TILE // (block_e * block_r))
    block_m = min(triton.next_power_of_2(max(1, memory)), max(1, TILE // block_t))
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_R": block_r, "BLOCK_M": block_m}


def epilogue(
    z: torch.Tensor,
    gates: torch.Tensor,
    document: torch.Tensor | None,
    width: int,
    gate: str | None,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale z's experts' columns [T, width] by their gates; memory passes -> (h [T, R + M], gate values).

    gates [D, E] are values, those of token t in row document[t] (None: [T, E], or [1, E] for all), and come back as
    they are; with `gate` they are logits [T, E], whose values [T, E] come back. Reads z once and writes h once.
    """
    T, E = z.shape[0], gates.shape[1]
    if E == 0:  # memory alone
        return z, gates
    z, gates = _rows(z), _rows(gates)
    h = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    values = None if gate is None else torch.empty(T, E, device=z.device)
    document = None if document is None else document.contiguous()
    sizes = _epilogue_sizes(z, gates, document, width)
    if T:
        _gated_epilogue_fwd_kernel[(triton.cdiv(T, sizes["BLOCK_T"]),)](
            *(z, gates, document, h, values, T), GATE=gate, TOP_K=top_k, **sizes
        )
    return h, gates if values is None else values


def epilogue_backward(
    dh: torch.Tensor,
    z: torch.Tensor,
    gates: torch.Tensor,
    document: torch.Tensor | None,
    width: int,
    gate: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dh [T, R + M] -> (dz [T, R + M], float32 gradient of the token's gates, or with `gate` of their logits, [T, E]).

    gates are values, as `epilogue` returns them. Reads dh and z once.
    """
    T, E = z.shape[0], gates.shape[1]
    if E == 0:
        return dh, gates.new_zeros(T, 0)
    dh, z, gates = _rows(dh), _rows(z), _rows(gates)
    dz = torch.empty(dh.shape, dtype=dh.dtype, device=dh.device)
    dgates = torch.empty(T, E, device=dh.device)
    document = None if document is None else document.contiguous()
    sizes = _epilogue_sizes(z, gates, document, width)
    if T:
        _gated_epilogue_bwd_kernel[(triton.cdiv(T, sizes["BLOCK_T"]),)](
            *(dh, z, gates, document, dz, dgates, T), stride_dh=dh.stride(0), GATE=gate, **sizes
        )
    return dz, dgates


def _epilogue_sizes(
    z: torch.Tensor, gates: torch.Tensor, document: torch.Tensor | None, width: int
) -> dict[str, int | bool]:
    E = gates.shape[1]
    return {
        "stride_z": z.stride(0),
        "stride_gates": 0 if gates.shape[0] == 1 else gates.stride(0),
        "E": E,
        "RANK": width // E,
        "WIDTH": z.shape[1],
        "HAS_DOCUMENT": document is not None,
        **epilogue_blocks(E, width // E, z.shape[1] - width),
    }


def products_blocks(T: int, O: int, rank: int, element_size: int) -> tuple[dict[str, int], int]:
    """Choose the tile of `products` and the outputs of a program; `rank` is the larger of R and S."""
    block_r = max(16, triton.next_power_of_2(rank))
    block_t, block_o = 16 * block_r // element_size, 64
    stretches = min(max(1, O // block_t), triton.cdiv(PROGRAMS, triton.cdiv(T, block_t)))
    stretch = triton.cdiv(triton.cdiv(O, stretches), block_o) * block_o
    sizes = {"BLOCK_T": block_t, "BLOCK_O": block_o, "BLOCK_R": block_r, "BLOCK_S": block_r}
    return sizes | {"num_warps": 4 if block_r == 16 else 8}, stretch


def products(dy: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both products that read dy: dy [T, O], b [O, R], h [T, S] -> (dh = dy b [T, R], dB = dy^T h [O, S]).

    A program reads a rectangle of dy, C tokens by at least C outputs, and leaves its part of either product in float32;
    torch adds the parts up in order. Each part is written and read, 8 bytes a number: T / C parts of dB cost
    8 O S T / C bytes, and O / C parts of dh cost 8 T R O / C, where dy has e T O, e the bytes of its numbers. With
    C = 16 max(R, S) / e each costs at most half of dy, so they stay below the second reading that is saved. Where there
    are tokens enough for all programs, one takes all outputs, and dh has no parts.

    The C tokens of a program are in its registers and shared memory together. There is room for them up to a rank of 32
    (`MOST_RANK`); where R or S is larger, or something is empty, these are two torch products.
    """
    T, O = dy.shape
    R, S = b.shape[1], h.shape[1]
    if max(R, S) > MOST_RANK or min(T, O, R, S) == 0:
        return dy @ b, dy.T @ h
    dy, b, h = _rows(dy), _rows(b), _rows(h)
    sizes, stretch = products_blocks(T, O, max(R, S), dy.element_size())
    chunks, stretches = triton.cdiv(T, sizes["BLOCK_T"]), triton.cdiv(O, stretch)
    dh = torch.empty(stretches, T, R, dtype=dy.dtype if stretches == 1 else torch.float32, device=dy.device)
    db = torch.empty(chunks, O, S, dtype=dy.dtype if chunks == 1 else torch.float32, device=dy.device)
    _gated_products_bwd_kernel[(chunks, stretches)](
        *(dy, b, h, dh, db, T, O, R, S, stretch, dy.stride(0), b.stride(0), h.stride(0)),
        # The interpreter takes bfloat16 for the integers that hold it; compiled code does not need this.
        UPCAST=not dy.is_cuda,
        **sizes,
    )
    return _sum(dh, dy.dtype), _sum(db, dy.dtype)


def active_tiles(values: torch.Tensor, document: torch.Tensor, block_t: int) -> torch.Tensor:
    """List the experts with a gate that is not 0 in each tile of block_t tokens -> int32 [tiles, E].

    values [D, E], document [T]. A tile's row names its active experts in ascending order and then, as -1 - e, the
    others: a kernel knows how many there are of either, and every expert has its place.
    """
    T, E = document.shape[0], values.shape[1]
    tiles = triton.cdiv(T, block_t)
    speaks = torch.zeros(tiles * block_t, E, dtype=torch.bool, device=values.device)
    speaks[:T] = (values != 0)[document]
    experts = torch.arange(E, device=values.device)
    order = torch.where(speaks.view(tiles, block_t, E).any(1), experts, E + experts).sort(1).values
    return torch.where(order < E, order, E - 1 - order).to(torch.int32)


def active_blocks(rank: int, block_t: int, element_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Choose the tiles of shrink_active and expand_active: the rank is padded to 16, the least that tl.dot takes.

    As large as fits the registers on every machine, where float32 needs more: each product takes three.
    """
    block_k = 128 // element_size
    block_r = min(block_k, max(16, triton.next_power_of_2(rank)))
    both = {"BLOCK_T": block_t, "BLOCK_R": block_r, "num_warps": 4 if block_t < 128 and element_size == 2 else 8}
    return both | {"BLOCK_I": block_k}, both | {"BLOCK_O": 256 // element_size}


def shrink_active(x: torch.Tensor, a: torch.Tensor, active: torch.Tensor, block_t: int) -> torch.Tensor:
    """Multiply tiles of tokens by their active experts: x [T, I], a [R, I] -> z [T, R], 0 for the others.

    active: of `active_tiles` with the same block_t, a power of 2 and at least 16.
    """
    x, a = _rows(x), _rows(a)
    T, I, E = x.shape[0], x.shape[1], active.shape[1]
    rank = a.shape[0] // E
    z = torch.empty(T, a.shape[0], dtype=x.dtype, device=x.device)
    sizes, _ = active_blocks(rank, block_t, x.element_size())
    if T:
        _shrink_active_fwd_kernel[(active.numel(), triton.cdiv(rank, sizes["BLOCK_R"]))](
            *(x, a, active, z, T, I, x.stride(0), a.stride(0)),
            E=E,
            RANK=rank,
            UPCAST=not x.is_cuda,
            **sizes,
        )
    return z


def expand_active(
    y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, active: torch.Tensor, block_t: int, scale: float
) -> torch.Tensor:
    """Add scale * h b^T to y, tiles of tokens with their active experts alone -> a new tensor [T, O].

    y [T, O], h [T, R], b [O, R]; columns of h whose expert is not active are not read. active: as in `shrink_active`.
    """
    y, h, b = _rows(y), _rows(h), _rows(b)
    T, O, E = y.shape[0], y.shape[1], active.shape[1]
    rank = b.shape[1] // E
    out = torch.empty(T, O, dtype=y.dtype, device=y.device)
    _, sizes = active_blocks(rank, block_t, h.element_size())
    if T:
        _expand_active_fwd_kernel[(active.shape[0] * triton.cdiv(O, sizes["BLOCK_O"]),)](
            *(y, h, b, active, out, scale, T, O, y.stride(0), h.stride(0), b.stride(0)),
            E=E,
            RANK=rank,
            UPCAST=not y.is_cuda,
            BLOCK_E=triton.next_power_of_2(E),
            **sizes,
        )
    return out


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    """Kernels take rows at any distance from each other, but the numbers of one beside each other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _sum(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(dtype)
