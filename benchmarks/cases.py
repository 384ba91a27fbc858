"""The shapes that are raced, named once."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class InfluenceCase:
    """One layer's share of influence_dot in a training step."""

    name: str
    inputs: int
    outputs: int
    tokens: int = 2048
    # Lengths of the documents; they fill the batch.
    lengths: tuple[int, ...] = (256,) * 8
    targets: int = 3
    groups: int = 4
    sketch_size: int = 4096

    @property
    def shape(self) -> str:
        even = "even" if len(set(self.lengths)) == 1 else "uneven"
        return f"T{self.tokens} D{len(self.lengths)} ({even}) I{self.inputs} O{self.outputs} A{self.targets}"


# Lengths of a packed batch as they come: one long document, many short ones.
PACKED = (700, 411, 290, 222, 160, 101, 77, 50, 21, 16)

INFLUENCE_DOT = (
    InfluenceCase(name="lora_a_512", inputs=512, outputs=16),
    InfluenceCase(name="lora_a_2048", inputs=2048, outputs=16),
    InfluenceCase(name="lora_a_4096", inputs=4096, outputs=16),
    InfluenceCase(name="lora_b_512", inputs=16, outputs=512),
    InfluenceCase(name="lora_b_4096", inputs=16, outputs=4096),
    InfluenceCase(name="lora_a_2048_packed", inputs=2048, outputs=16, lengths=PACKED),
    InfluenceCase(name="lora_b_2048_packed", inputs=16, outputs=2048, lengths=PACKED),
    InfluenceCase(name="lora_a_2048_rank_8", inputs=2048, outputs=8),
    InfluenceCase(name="full_512", inputs=512, outputs=512),
)


@dataclass(frozen=True, kw_only=True)
class SketchCase:
    """Matrices that exist, to be sketched; a flat vector is a matrix of one row."""

    name: str
    matrices: int
    rows: int
    cols: int
    dtype: str = "float32"
    sketch_size: int = 4096

    @property
    def shape(self) -> str:
        return f"B{self.matrices} O{self.rows} I{self.cols} K{self.sketch_size}"


SKETCH_MATRIX = (
    SketchCase(name="flat_1m", matrices=4, rows=1, cols=1 << 20),
    SketchCase(name="flat_1m_bf16", matrices=4, rows=1, cols=1 << 20, dtype="bfloat16"),
    SketchCase(name="lora_a_2048", matrices=8, rows=16, cols=2048),
    SketchCase(name="lora_b_2048_rank_8", matrices=8, rows=2048, cols=8),
    SketchCase(name="full_512", matrices=8, rows=512, cols=512),
    SketchCase(name="rows_of_tokens", matrices=2048, rows=1, cols=512, sketch_size=256),
)


@dataclass(frozen=True, kw_only=True)
class ProjectCase:
    """One layer's share of sample_grad_project in a training step."""

    name: str
    inputs: int
    outputs: int
    tokens: int = 2048
    lengths: tuple[int, ...] = (256,) * 8
    sketch_size: int = 4096

    @property
    def shape(self) -> str:
        even = "even" if len(set(self.lengths)) == 1 else "uneven"
        return f"T{self.tokens} D{len(self.lengths)} ({even}) I{self.inputs} O{self.outputs} K{self.sketch_size}"


SAMPLE_GRAD_PROJECT = (
    ProjectCase(name="full_512", inputs=512, outputs=512),
    ProjectCase(name="mlp_512_1408", inputs=512, outputs=1408),
    ProjectCase(name="lora_a_2048", inputs=2048, outputs=16),
    ProjectCase(name="lora_b_2048", inputs=16, outputs=2048),
    ProjectCase(name="full_512_packed", inputs=512, outputs=512, lengths=PACKED),
)


@dataclass(frozen=True, kw_only=True)
class StoreCase:
    """A store in memory that is scanned for the best rows."""

    name: str
    rows: int
    size: int
    queries: tuple[int, ...] = (1, 16, 64)
    k: int = 10


STORE_TOPK = (
    StoreCase(name="100k_x_1024", rows=100_000, size=1024),
    StoreCase(name="25k_x_4096", rows=25_000, size=4096),
)


@dataclass(frozen=True, kw_only=True)
class GatedCase:
    """One frozen linear layer with gated experts. Gates are the softmax of each token's logits.

    With `top_k` they are the softmax over each sequence's largest logits, for `sequences` of one length.
    """

    name: str
    inputs: int
    outputs: int
    tokens: int = 2048
    experts: int = 8
    rank: int = 16
    top_k: int = 0
    sequences: int = 8
    dtype: str = "float32"

    @property
    def shape(self) -> str:
        gates = f" top-{self.top_k} D{self.sequences}" if self.top_k else ""
        return f"T{self.tokens} I{self.inputs} O{self.outputs} E{self.experts} r{self.rank}{gates}"


GATED_ADAPTER = (
    GatedCase(name="d512_e4_r16", inputs=512, outputs=512, experts=4),
    GatedCase(name="d1024_e8_r8", inputs=1024, outputs=1024, rank=8),
    GatedCase(name="d1024_e8_r16", inputs=1024, outputs=1024),
    GatedCase(name="d1024_e8_r16_t256", inputs=1024, outputs=1024, tokens=256),
    GatedCase(name="d1024_top2_r64", inputs=1024, outputs=1024, rank=64, top_k=2),
)

GATED_ADAPTER_CUDA = (
    *(
        GatedCase(name=f"{inputs}x{outputs}_t{tokens}", inputs=inputs, outputs=outputs, tokens=tokens, dtype="bfloat16")
        for inputs, outputs in ((2048, 2048), (4096, 4096), (4096, 14336))
        for tokens in (256, 1024, 8192)
    ),
    *(
        GatedCase(name=f"{d}_top2_r64", inputs=d, outputs=d, tokens=8192, rank=64, top_k=2, dtype="bfloat16")
        for d in (2048, 4096)
    ),
)
