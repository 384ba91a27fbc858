"""store_topk on CUDA: one pass over the rows; of the scores, only those that may enter a top-k are kept.

N rows, Q queries, K numbers of a row, M blocks with a scale each, W elements of a stored row (bytes of K / 8 bits),
C candidates of a query, G groups.

Few queries: one kernel scores a tile of rows and looks at the scores in its registers. Many queries: torch's products
score a chunk of rows that stays in the cache, and a second kernel looks at it (the H200's GEMM took half the time of
Triton's at 128 queries). Either way rows are scanned in stretches that grow. A stretch appends every score past its
query's k-th best before it to a list of candidates, in an order that is that of chance; their keys are distinct numbers
that order them by score and then by row, so what is kept does not depend on chance. Where a list overflows (rows that
come in order of their score) the scan is done again in stretches that cannot.
"""

import torch
import triton
import triton.language as tl

GROWTH = 32  # a stretch is at most so many times what was scanned before
RANKED = 4096  # keys of a list that are compared all with all to find the best; torch.topk takes longer lists
FEW_QUERIES = 32  # up to here the fused kernel
CHUNK_SCORES = 1 << 23  # scores of a chunk, 32 MiB: most stay in the cache
NO_KEY = -(1 << 63)


@triton.jit
def _lowest_bits(data, PACKED: tl.constexpr):
    """Bit 0 of every byte, as int8."""
    if PACKED:
        # Four bytes a register: Triton by itself would widen every byte.
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x01010101;", "=r,r", [data], dtype=tl.int8, is_pure=True, pack=4
        )
    return (data & 1).to(tl.int8)


@triton.jit
def _shift(data, PACKED: tl.constexpr):
    """Bring the next bit of every byte to place 0; what comes into the highest places is never looked at."""
    if PACKED:
        return tl.inline_asm_elementwise("shr.u32 $0, $1, 1;", "=r,r", [data], dtype=tl.uint8, is_pure=True, pack=4)
    return data >> 1


@triton.jit
def _take(
    score,
    row,
    query,
    is_row,
    is_query,
    thresholds,
    keys,
    counts,
    groups,
    partial,
    Q,
    k,
    C,
    tile,
    G: tl.constexpr,
    ALL: tl.constexpr,  # every row is a candidate, and has a place of its own
):
    """Append candidates of a tile of scores [BLOCK_N, BLOCK_Q] to the lists, and add its scores up by group."""
    inside = is_row[:, None] & is_query[None, :]
    number = 0xFFFFFFFF - row  # of two equal scores the lower row is the greater key
    for sign in tl.static_range(2):
        value = score if sign == 0 else -score
        list_of = sign * Q + query.to(tl.int64)
        to = keys + list_of * (k + C)  # [BLOCK_Q]
        bits = value.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the floats are
        if ALL:
            key = (bits.to(tl.int64) << 32) | number[:, None]
            tl.store(to[None, :] + k + row[:, None], key, mask=inside)
        else:
            # An equal score of a later row does not enter.
            enters = inside & (bits > tl.load(thresholds + sign * Q + query, is_query, 0)[None, :])
            # Over both axes at once: two nested sums fail to compile for sm_100 in Triton 3.7.1.
            if tl.sum(enters.to(tl.int32)) != 0:
                counter = counts + list_of[None, :] + tl.zeros([row.shape[0], 1], tl.int64)
                slot = tl.atomic_add(counter, 1, mask=enters, sem="relaxed")
                key = (bits.to(tl.int64) << 32) | number[:, None]
                tl.store(to[None, :] + k + slot, key, mask=enters & (slot < C))
    if G > 0:
        group = tl.load(groups + row, is_row, -1)
        for g in range(G):
            total = tl.sum(tl.where(inside & (group == g)[:, None], score, 0.0), 0)
            tl.store(partial + (tile * G + g) * Q + query, total, mask=is_query)


@triton.jit
def _store_topk_fwd_kernel(
    rows,  # bfloat16 [N, K], int8 [N, K] or uint8 [N, W]
    scales,  # [N, M]
    queries,  # bfloat16 [Q, K], int8 [Q, K], or int8 [8, Q, W] for bits
    steps,  # [Q, M] of the quantised queries
    query_sums,  # int32 [Q, M] of the quantised queries, for bits
    thresholds,  # int32 [2, Q]: the ordered bits of the k-th best score before this stretch
    keys,  # int64 [2, Q, k + C]: of the best before this stretch, best first, and then of its candidates
    counts,  # int32 [2, Q]
    groups,  # [N]
    partial,  # [tiles, G, Q]
    Q,
    k,
    C,
    W,
    first,  # this stretch is rows first <= n < last
    last,
    G: tl.constexpr,
    M: tl.constexpr,
    ALL: tl.constexpr,
    EVEN: tl.constexpr,  # whether blocks of a row are whole tiles
    IS_BF16: tl.constexpr,
    IS_BITS: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    row = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N] int64
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    is_row = row < last
    is_query = query < Q
    # Rows past the end read the last one, and queries too; their scores are masked.
    at_row = rows + tl.minimum(row, last - 1)[:, None] * W  # [BLOCK_N, 1]
    at_query = queries + tl.minimum(query, Q - 1)[None, :].to(tl.int64) * W  # [1, BLOCK_Q]
    score = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    width = W // M
    for m in range(M):
        whole = tl.zeros([BLOCK_N, BLOCK_Q], tl.int32)
        for begin in range(0, width, BLOCK_K):
            place = begin + tl.arange(0, BLOCK_K)
            used = place < width
            place += m * width
            if EVEN:
                block = tl.load(at_row + place[None, :])  # [BLOCK_N, BLOCK_K]
            else:
                block = tl.load(at_row + place[None, :], used[None, :], 0)
            if IS_BITS:
                for plane in tl.static_range(8):
                    other = tl.load(at_query + plane * Q * W + place[:, None], used[:, None], 0)  # [BLOCK_K, BLOCK_Q]
                    whole = tl.dot(_lowest_bits(block, PACKED), other, whole, out_dtype=tl.int32)
                    block = _shift(block, PACKED)
            else:
                if EVEN:
                    other = tl.load(at_query + place[:, None])
                else:
                    other = tl.load(at_query + place[:, None], used[:, None], 0)
                if IS_BF16:
                    if UPCAST:
                        block = block.to(tl.float32)
                        other = other.to(tl.float32)
                    score = tl.dot(block, other, score)
                else:
                    whole = tl.dot(block, other, whole, out_dtype=tl.int32)
        if not IS_BF16:
            if IS_BITS:  # a set bit is a minus
                whole = tl.load(query_sums + query * M + m, is_query, 0)[None, :] - 2 * whole
            scale = tl.load(scales + row * M + m, is_row, 0.0)
            step = tl.load(steps + query * M + m, is_query, 0.0)
            score += whole.to(tl.float32) * (scale[:, None] * step[None, :])
    _take(score, row, query, is_row, is_query, thresholds, keys, counts, groups, partial, Q, k, C, tile, G, ALL)


@triton.jit
def _store_topk_scored_kernel(
    dots,  # float32 [n, Q], or int32 [M, n, Q] of integers
    scales,
    steps,
    thresholds,
    keys,
    counts,
    groups,
    partial,
    Q,
    k,
    C,
    stride,  # of a row of `dots`, whose last columns may be padding
    first,
    last,
    G: tl.constexpr,
    M: tl.constexpr,
    ALL: tl.constexpr,
    IS_BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILES: tl.constexpr,
):
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = query < Q
    # Small tiles: few hold a candidate, and the others are done with after a comparison.
    for i in range(TILES):
        tile = tl.program_id(0).to(tl.int64) * TILES + i
        number = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row = first + number
        is_row = row < last
        inside = is_row[:, None] & is_query[None, :]
        at = dots + number[:, None] * stride + query[None, :]
        if IS_BF16:
            score = tl.load(at, inside, 0.0)
        else:
            score = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            for m in range(M):
                whole = tl.load(at + m * (last - first) * stride, inside, 0)
                scale = tl.load(scales + row * M + m, is_row, 0.0)
                step = tl.load(steps + query * M + m, is_query, 0.0)
                score += whole.to(tl.float32) * (scale[:, None] * step[None, :])
        _take(score, row, query, is_row, is_query, thresholds, keys, counts, groups, partial, Q, k, C, tile, G, ALL)


@triton.jit
def _rank_kernel(keys, out, thresholds, size, k, out_size, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Write the k greatest of each list keys [lists, size] to the front of out [lists, out_size], greatest first.

    thresholds [lists] gets the upper half of the last of them, and is left as it is where there are fewer.
    """
    list_of = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    every = tl.arange(0, SIZE)
    key = tl.load(keys + list_of * size + mine, mine < size, -(1 << 63))
    other = tl.load(keys + list_of * size + every, every < size, -(1 << 63))
    # Keys are distinct; only those of nothing are equal, and they are not written. A list's are in its last places.
    if tl.max(key, 0) != -(1 << 63):
        rank = tl.sum((other[None, :] > key[:, None]).to(tl.int32), 1)
        is_key = key != -(1 << 63)
        tl.store(out + list_of * out_size + rank, key, mask=is_key & (rank < k))
        tl.store(thresholds + list_of + tl.zeros([BLOCK], tl.int32), (key >> 32).to(tl.int32), is_key & (rank == k - 1))


@triton.jit
def _answer_kernel(keys, values, rows, size, stride, signs, first_row, BLOCK: tl.constexpr):
    """Turn keys [lists, size] into scores and row numbers; the second half of the lists holds negated scores."""
    list_of = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    key = tl.load(keys + list_of * stride + at, inside, 0)
    missing = key == -(1 << 63)
    bits = (key >> 32).to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    value = tl.where(missing, float("-inf"), value)
    value = tl.where(list_of >= signs, -value, value)
    tl.store(values + list_of * size + at, value, inside)
    row = (0xFFFFFFFF - (key & 0xFFFFFFFF)) + first_row
    tl.store(rows + list_of * size + at, tl.where(missing, -1, row), inside)


def tiles(format: str, num_queries: int) -> dict[str, int]:
    """Choose the tile of the fused kernel (measured on an H200)."""
    most = 16 if format == "1bit" else FEW_QUERIES
    block_q = min(most, max(16, triton.next_power_of_2(num_queries)))
    block_k = {"bf16": 64, "int8": 128, "1bit": 64}[format]
    return {"BLOCK_N": 128, "BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}


def scan(
    format: str,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    queries: torch.Tensor,
    steps: torch.Tensor | None,
    k: int,
    groups: torch.Tensor | None,
    num_groups: int,
    *,
    first_row: int = 0,
    watch: torch.Tensor | None = None,
    tile: dict[str, int] | None = None,
    scan_bits=None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], bool]:
    """Find the k largest and k smallest scores -> values [Q, k] and rows [Q, k], of each sign; and sums [Q, G] float64.

    The second part of the answer is the value of `watch`, a bool on the device: it comes with the scan's own flag, in
    the one wait for the device that there is.

    queries: bfloat16 [Q, K] for bf16, else int8 [Q, K] with steps [Q, M]. Row n has the number first_row + n; missing
    rows are -1. A `tile` asks for the fused kernel whatever Q is; `scan_bits` (fastsft.ops._cuda.store_topk_bits) does
    a stretch of 1bit rows for 1, 2 or 4 queries without groups. N is at most 2**32 - 1: a key holds a row in 32 bits.
    """
    work = _Scan(format, data, scales, queries, steps, k, groups, num_groups, tile)
    work.scan_bits = scan_bits
    return work.run(first_row, watch)


class _Scan:
    """One scan: what every launch is given, and what was found so far."""

    def __init__(self, format, data, scales, queries, steps, k, groups, num_groups, tile) -> None:
        self.format, self.data, self.scales, self.steps, self.k = format, data, scales, steps, k
        self.groups, self.G = groups, 0 if groups is None else num_groups
        self.N, self.Q, self.W = data.shape[0], queries.shape[0], data.shape[1]
        self.M = 1 if scales is None else scales.shape[1]
        self.numbers = queries.contiguous()  # [Q, K]
        self.planes = self.numbers
        self.query_sums = None
        if format == "1bit":
            # Number 8 w + b of a row is bit b of byte w: the queries of plane b are numbers b, 8 + b, ...
            self.planes = queries.unflatten(1, (-1, 8)).permute(2, 0, 1).contiguous()  # [8, Q, W]
            self.query_sums = queries.unflatten(1, (self.M, -1)).sum(2, dtype=torch.int32)
        # Bits would have to be written out as bytes for a product of torch's.
        self.fused = tile is not None or self.Q <= FEW_QUERIES or format == "1bit"
        self.tile = tile or tiles(format, self.Q)
        self.thresholds: torch.Tensor | None = None
        self.no = torch.zeros((), dtype=torch.bool, device=data.device)
        self.sums: torch.Tensor | None = None
        self.scan_bits = None

    def run(self, first_row: int, watch: torch.Tensor | None):
        # Rows in no order leave about k * growth candidates: a third of the room, as that is a matter of chance.
        room = max(4 * self.k, min(RANKED, triton.next_power_of_2(3 * self.k * GROWTH)) - self.k)
        growth = max(1, min(GROWTH, room // (3 * self.k)))
        keys, overflowed = self.sweep(room, growth)
        answer = self.answer(keys, first_row)
        # Asked last: the answer is a wait for the device.
        asked = [flag if flag is not None else self.no for flag in (overflowed, watch)]
        again, watched = torch.stack(asked).tolist()
        if again:
            keys, _ = self.sweep(room, 0)
            answer = self.answer(keys, first_row)
        return answer, watched

    def sweep(self, most: int, growth: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scan all rows -> keys [2, Q, k or more], best first; and whether a list of candidates overflowed."""
        device = self.data.device
        self.sums = torch.zeros(self.Q, self.G, dtype=torch.float64, device=device) if self.groups is not None else None
        if self.N == 0 or self.Q == 0:
            return torch.full((2, self.Q, self.k), NO_KEY, device=device), None
        # The first stretch is all candidates. A stretch of as many rows as there is room for cannot overflow.
        stretches = [(0, min(self.N, most))]
        while stretches[-1][1] < self.N:
            first = stretches[-1][1]
            stretches.append((first, min(self.N, first + max(most, growth * first))))
        rooms = [min(most, last - first) for first, last in stretches]
        # Under every score. Apart from the keys, which lie far from each other: each tile reads all of them.
        self.thresholds = torch.full((2, self.Q), -(1 << 31), dtype=torch.int32, device=device)
        counts = torch.zeros(len(rooms), 2, self.Q, dtype=torch.int32, device=device)
        keys = torch.full((2, self.Q, self.k + rooms[0]), NO_KEY, device=device)
        for number, (first, last) in enumerate(stretches):
            self.stretch(keys, counts[number], rooms[number], first, last)
            # The best come to the front of the next stretch's list, or of the answer's.
            keys = self.best(keys, rooms[number + 1] if number + 1 < len(rooms) else 0)
        can_overflow = any(last - first > room for (first, last), room in zip(stretches, rooms, strict=True))
        return keys, (counts > most).any() if can_overflow else None

    def best(self, keys: torch.Tensor, room: int) -> torch.Tensor:
        size = keys.shape[2]
        out = torch.full((2, self.Q, self.k + room), NO_KEY, device=keys.device)
        if size > RANKED:
            out[..., : self.k] = keys.topk(self.k, dim=2).values
            self.thresholds = (out[..., self.k - 1] >> 32).to(torch.int32)
            return out
        grid = (2 * self.Q, triton.cdiv(size, 32))
        width = max(32, triton.next_power_of_2(size))
        _rank_kernel[grid](keys, out, self.thresholds, size, self.k, self.k + room, BLOCK=32, SIZE=width)
        return out

    def answer(self, keys: torch.Tensor, first_row: int):
        values = torch.empty(2, self.Q, self.k, device=keys.device)
        rows = torch.empty(2, self.Q, self.k, dtype=torch.int64, device=keys.device)
        if self.Q:
            grid = (2 * self.Q, triton.cdiv(self.k, 64))
            _answer_kernel[grid](keys, values, rows, self.k, keys.shape[2], self.Q, first_row, BLOCK=64)
        return values[0], rows[0], values[1], rows[1], self.sums

    def stretch(self, keys, counts, room: int, first: int, last: int) -> None:
        if self.scan_bits is not None:
            planes = self.planes.transpose(0, 1).contiguous()
            rest = (self.steps, self.query_sums, self.thresholds, keys, counts, self.k, room)
            self.scan_bits(self.data, self.scales, planes, *rest, first, last)
            return
        if self.fused:
            self.launch(keys, counts, room, first, last)
            return
        rows = max(128, CHUNK_SCORES // (self.Q * self.M))
        for begin in range(first, last, rows):
            end = min(last, begin + rows)
            self.launch_scored(self.dots(begin, end), keys, counts, room, begin, end, is_all=last <= room)

    def dots(self, first: int, last: int) -> torch.Tensor:
        """Multiply rows first <= n < last with the queries -> float32 [n, Q], or int32 [M, n, Q padded]."""
        data = self.data[first:last]
        if self.format == "bf16":
            if data.is_cuda:
                return torch.mm(data, self.numbers.T, out_dtype=torch.float32)
            return data.float() @ self.numbers.float().T
        # What torch._int_mm takes: more than 16 rows, and a multiple of 8 queries.
        num, numbers = data.shape[0], self.numbers
        if num < 17:
            data = torch.nn.functional.pad(data, (0, 0, 0, 17 - num))
        if self.Q % 8:
            numbers = torch.nn.functional.pad(numbers, (0, 0, 0, -self.Q % 8))
        blocks = zip(data.chunk(self.M, 1), numbers.chunk(self.M, 1), strict=True)
        products = [torch._int_mm(a.contiguous(), b.contiguous().T)[:num] for a, b in blocks]
        return products[0] if self.M == 1 else torch.stack(products)

    def launch(self, keys, counts, room: int, first: int, last: int) -> None:
        num_tiles = triton.cdiv(last - first, self.tile["BLOCK_N"])
        partial = self.partial(num_tiles)
        _store_topk_fwd_kernel[(num_tiles, triton.cdiv(self.Q, self.tile["BLOCK_Q"]))](
            *(self.data, self.scales, self.planes, self.steps, self.query_sums, self.thresholds, keys, counts),
            *(self.groups, partial, self.Q, self.k, room, self.W, first, last),
            G=self.G,
            M=self.M,
            ALL=last <= room,
            EVEN=self.W // self.M % self.tile["BLOCK_K"] == 0,
            IS_BF16=self.format == "bf16",
            IS_BITS=self.format == "1bit",
            PACKED=self.data.is_cuda,
            # The interpreter takes bfloat16 for the integers that hold it.
            UPCAST=not self.data.is_cuda,
            **self.tile,
        )
        self.add_sums(partial)

    def launch_scored(self, dots, keys, counts, room: int, first: int, last: int, *, is_all: bool) -> None:
        block_n, num_tiles = 8, 2
        grid = (triton.cdiv(last - first, block_n * num_tiles), triton.cdiv(self.Q, 64))
        partial = self.partial(grid[0] * num_tiles)
        _store_topk_scored_kernel[grid](
            *(dots, self.scales, self.steps, self.thresholds, keys, counts),
            *(self.groups, partial, self.Q, self.k, room, dots.shape[-1], first, last),
            G=self.G,
            M=self.M,
            ALL=is_all,
            IS_BF16=self.format == "bf16",
            BLOCK_N=block_n,
            BLOCK_Q=64,
            TILES=num_tiles,
            num_warps=1,
        )
        self.add_sums(partial)

    def partial(self, num_tiles: int) -> torch.Tensor | None:
        """Room for the sums by group of each tile: they are added in order."""
        if self.sums is None:
            return None
        return torch.zeros(num_tiles, self.G, self.Q, device=self.data.device)

    def add_sums(self, partial: torch.Tensor | None) -> None:
        if self.sums is not None and partial is not None:
            self.sums += partial.sum(0, dtype=torch.float64).T
