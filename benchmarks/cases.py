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
