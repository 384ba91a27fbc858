"""gated_adapter on CUDA: the gate epilogue, its backward pass, both products with dy at once, products that skip.

T tokens, D sequences, I inputs, O outputs, E experts, R = E * rank, M memory rank, S columns of h, P rows of a weight
of which a sequence has chosen N.

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
def _find_tile(
    offsets,  # [D + 1]
    place,
    D,
    BLOCK_T: tl.constexpr,
):
    """Find the sequence of the tile at `place`, its first token, and where the sequence ends: see `times_chosen`."""
    count = 0
    for first in range(0, D, 128):
        documents = first + tl.arange(0, 128)
        is_document = documents < D
        places = tl.load(offsets + documents, is_document, 0) // BLOCK_T + documents
        count += tl.sum((is_document & (places <= place)).to(tl.int32), 0)
    document = (count - 1).to(tl.int64)
    begin = tl.load(offsets + document)
    token = begin + (place - begin // BLOCK_T - document) * BLOCK_T
    return document, token, tl.load(offsets + document + 1)


@triton.jit
def _times_chosen_fwd_kernel(
    x,  # [T, I]
    weight,  # [P, I]
    columns,  # [D, N]
    offsets,  # [D + 1]
    out,  # [T, N]
    D,
    I,
    N,
    stride_x,
    stride_weight,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The columns of a tile beside each other: what one has read of x is in the cache for the next.
    place = tl.program_id(0).to(tl.int64)
    blocks_n = tl.cdiv(N, BLOCK_N)
    document, token, end = _find_tile(offsets, place // blocks_n, D, BLOCK_T)
    if token >= end:
        return
    tokens = token + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    own = (place % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = tokens < end
    is_own = own < N
    rows = tl.load(columns + document * N + own, is_own, 0)  # [BLOCK_N]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for first in range(0, I, BLOCK_I):
        cols = first + tl.arange(0, BLOCK_I)
        is_col = cols < I
        x_block = tl.load(
            x + tokens[:, None] * stride_x + cols[None, :], is_token[:, None] & is_col[None, :], 0.0
        )  # [BLOCK_T, BLOCK_I]
        w_block = tl.load(
            weight + rows[None, :] * stride_weight + cols[:, None], is_own[None, :] & is_col[:, None], 0.0
        )  # [BLOCK_I, BLOCK_N]
        if UPCAST:
            x_block = x_block.to(tl.float32)
            w_block = w_block.to(tl.float32)
        total = tl.dot(x_block, w_block, total, input_precision="tf32x3")
    tl.store(out + tokens[:, None] * N + own[None, :], total, is_token[:, None] & is_own[None, :])


@triton.jit
def _add_chosen_fwd_kernel(
    into,  # [T, O]
    z,  # [T, N]
    weight,  # [P, O]
    columns,  # [D, N]
    offsets,  # [D + 1]
    scale,
    D,
    O,
    N,
    stride_into,
    stride_z,
    stride_weight,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The outputs of a tile beside each other: they read the same rows of z.
    place = tl.program_id(0).to(tl.int64)
    blocks_o = tl.cdiv(O, BLOCK_O)
    document, token, end = _find_tile(offsets, place // blocks_o, D, BLOCK_T)
    if token >= end:
        return
    tokens = token + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    cols = (place % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    is_token = tokens < end
    is_col = cols < O
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for first in range(0, N, BLOCK_N):
        own = first + tl.arange(0, BLOCK_N)
        is_own = own < N
        rows = tl.load(columns + document * N + own, is_own, 0)  # [BLOCK_N]
        z_block = tl.load(
            z + tokens[:, None] * stride_z + own[None, :], is_token[:, None] & is_own[None, :], 0.0
        )  # [BLOCK_T, BLOCK_N]
        w_block = tl.load(
            weight + rows[:, None] * stride_weight + cols[None, :], is_own[:, None] & is_col[None, :], 0.0
        )  # [BLOCK_N, BLOCK_O]
        if UPCAST:
            z_block = z_block.to(tl.float32)
            w_block = w_block.to(tl.float32)
        total = tl.dot(z_block, w_block, total, input_precision="tf32x3")
    inside = is_token[:, None] & is_col[None, :]
    to = into + tokens[:, None] * stride_into + cols[None, :]
    tl.store(to, tl.load(to, inside, 0.0).to(tl.float32) + scale * total, inside)


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


def chosen_blocks(num_columns: int, element_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Choose the tiles of times_chosen and add_chosen: columns are padded to 16, the least that tl.dot takes.

    As large as fits the registers on every machine, where float32 needs more: each product takes three.
    """
    widest, depth = 256 // element_size, 128 // element_size
    padded = max(16, triton.next_power_of_2(num_columns))
    both = {"BLOCK_T": 64, "num_warps": 4 if element_size == 2 else 8}
    times = both | {"BLOCK_I": depth, "BLOCK_N": min(widest, padded)}
    return times, both | {"BLOCK_O": widest, "BLOCK_N": min(depth, padded)}


def times_chosen(x: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Multiply each sequence's tokens by its own rows of a weight -> [T, N], in x's type.

    x [T, I], weight [P, I], columns [D, N] int64: the rows of weight that sequence d has; offsets [D + 1] int64: its
    tokens are offsets[d] <= t < offsets[d + 1], from 0 to T.

    A tile has C tokens of one sequence, and the host does not know how many tiles there are. Sequence d has the places
    from offsets[d] // C + d up to those of d + 1: as many as its tiles or one more, since (a + L) // C - a // C + 1 is
    at least L / C rounded up. So T // C + D programs are enough, each finds its sequence by counting those that begin
    at or before its place, and up to D of them find no token and return.
    """
    x, weight, columns, offsets = _rows(x), _rows(weight), columns.contiguous(), offsets.contiguous()
    (T, I), (D, N) = x.shape, columns.shape
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    sizes, _ = chosen_blocks(N, x.element_size())
    if out.numel():
        tiles = T // sizes["BLOCK_T"] + D
        _times_chosen_fwd_kernel[(tiles * triton.cdiv(N, sizes["BLOCK_N"]),)](
            *(x, weight, columns, offsets, out, D, I, N, x.stride(0), weight.stride(0)),
            UPCAST=not x.is_cuda,
            **sizes,
        )
    return out


def add_chosen(
    into: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Add scale * z [T, N] times each sequence's own rows of weight [P, O] to `into` [T, O], in place -> `into`.

    In place is what it is for: a base layer's outputs, read and written once. columns, offsets and tiles: as in
    `times_chosen`.
    """
    (T, O), (D, N) = into.shape, columns.shape
    if min(T, O, N) == 0:
        return into
    if into.stride(1) != 1 and O > 1:
        return into.copy_(add_chosen(into.contiguous(), z, weight, columns, offsets, scale))
    z, weight, columns, offsets = _rows(z), _rows(weight), columns.contiguous(), offsets.contiguous()
    _, sizes = chosen_blocks(N, z.element_size())
    tiles = T // sizes["BLOCK_T"] + D
    _add_chosen_fwd_kernel[(tiles * triton.cdiv(O, sizes["BLOCK_O"]),)](
        *(into, z, weight, columns, offsets, scale, D, O, N),
        *(into.stride(0), z.stride(0), weight.stride(0)),
        UPCAST=not z.is_cuda,
        **sizes,
    )
    torch.autograd.graph.increment_version(into)  # as torch's own products in place do
    return into


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    """Kernels take rows at any distance from each other, but the numbers of one beside each other.

    A transposed weight is copied for it: small beside the tokens that meet it.
    """
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _sum(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(dtype)
