"""Race gated_adapter: loops over experts, one stack by autograd, by ops.gated_adapter and compiled, one plain LoRA.

"peft loop" scales x by an expert's gate, then multiplies by A and B, as PEFT's X-LoRA does; "loramoe loop" scales what
comes out of B. Modes: `forward`, of a training step; `forward+backward`, gradients of x and of all adapter weights.
`ratio_to_reference` is against the frozen layer alone ("frozen base") in the same mode, round by round.
`flop_ratio` is what products of all experts cost beside it, and `ratio_to_flops` the first over the second; where a
sequence uses some experts alone, `chosen_flop_ratio` counts the products that it needs. `saved_bytes`: kept for the
backward pass, beside x and weights. `peak_bytes`: above what was held before a pass forward and backward; on a CPU
counted in a process of its own.
"""

# T tokens, D sequences, I inputs, O outputs, E experts, P rows of A, W columns of B

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import GATED_ADAPTER, GATED_ADAPTER_CUDA, GatedCase
from benchmarks.harness import ratio, rounds
from benchmarks.memory import extra_peak
from fastsft import ops

REFERENCE = "frozen base"
COMPILED = "torch.compile of stacked"
# one case, for a compilation takes most of a minute there
COMPILED_ON_CPU = ("d1024_e8_r16_t256",)
SCALE = 2.0
# X-LoRA's `global_scaling_weight`: PEFT 0.21 multiplies by it even where it is 1
GLOBAL_SCALE = 1.0
# of the norm: float32 sums of some thousand products, and bfloat16 roundings of gates, products and their sums
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
CASES = {case.name: case for case in (*GATED_ADAPTER, *GATED_ADAPTER_CUDA)}


class Provider(NamedTuple):
    """A way to compute the layer: `run` makes y [T, O], and `leaves` are what its gradient is formed of.

    join: gradients of the leaves -> (dx, dA with the router's, dB), None where it computes something else.
    """

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    join: Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor, Tensor]] | None = None

    def training(self, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(), self.leaves, dy)


class Layer:
    """Random x [T, I], dy [T, O], a frozen layer, and adapter weights, stacked and an expert at a time."""

    def __init__(self, case: GatedCase, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device, getattr(torch, case.dtype))

        self.case, self.device = case, device
        I, O, E, W = case.inputs, case.outputs, case.experts, case.experts * case.rank
        self.x, self.dy = draw(case.tokens, I).requires_grad_(), draw(case.tokens, O)
        self.base = nn.Linear(I, O, bias=False, device=device, dtype=self.x.dtype).requires_grad_(False)
        self.a = draw(W + E, I, scale=I**-0.5).requires_grad_()
        self.b = draw(O, W, scale=W**-0.5).requires_grad_()
        self.lone = self.a[:W].detach().clone().requires_grad_()
        self.router = self.a[W:].detach().clone().requires_grad_()
        self.each_a = [part.detach().clone().requires_grad_() for part in self.a[:W].split(case.rank)]
        self.each_b = [part.detach().clone().requires_grad_() for part in self.b.split(case.rank, 1)]
        prompt = torch.ones(case.sequences, case.tokens // case.sequences, dtype=torch.bool, device=device)
        self.sequences = ops.Sequences.of_rows(prompt)

    def gates(self, logits: Tensor) -> Tensor:
        """Gates [T, E] by autograd."""
        if not self.case.top_k:
            return torch.softmax(logits, 1, dtype=torch.float32).to(logits.dtype)
        pooled = logits.unflatten(0, (self.case.sequences, -1)).mean(1, dtype=torch.float32)
        values, experts = pooled.topk(self.case.top_k, 1)
        g = torch.zeros_like(pooled).scatter(1, experts, values.softmax(1))
        return g.to(logits.dtype).repeat_interleave(self.case.tokens // self.case.sequences, 0)

    def peft_loop(self) -> Tensor:
        g = self.gates(self.x @ self.router.T)
        result = self.base(self.x)
        for e, (a, b) in enumerate(zip(self.each_a, self.each_b)):
            result += (((self.x * g[:, e, None]) @ a.T) @ b.T) * SCALE * GLOBAL_SCALE
        return result

    def loramoe_loop(self) -> Tensor:
        g = self.gates(self.x @ self.router.T)
        result = self.base(self.x)
        for e, (a, b) in enumerate(zip(self.each_a, self.each_b)):
            result += (((self.x @ a.T) @ b.T) * SCALE) * g[:, e, None]
        return result

    def stacked(self) -> Tensor:
        z = self.x @ self.a.T
        width = self.b.shape[1]
        g = self.gates(z[:, width:])
        h = (z[:, :width].unflatten(1, (self.case.experts, self.case.rank)) * g[:, :, None]).flatten(1)
        return torch.addmm(self.base(self.x), h, self.b.T, alpha=SCALE)

    def ours(self) -> Tensor:
        per_sequence = {"gate": "topk", "top_k": self.case.top_k, "per": "sequence", "sequences": self.sequences}
        return ops.gated_adapter(
            *(self.x, self.a, self.b),
            num_experts=self.case.experts,
            rank=self.case.rank,
            base=self.base,
            scale=SCALE,
            **(per_sequence if self.case.top_k else {"gate": "softmax"}),
        )

    def one_lora(self) -> Tensor:
        return self.base(self.x) + ((self.x @ self.lone.T) @ self.b.T) * SCALE

    def providers(self) -> dict[str, Provider]:
        def join_loop(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
            dx, drouter, *rest = grads
            return dx, torch.cat([*rest[: len(self.each_a)], drouter]), torch.cat(rest[len(self.each_a) :], 1)

        loop = [self.x, self.router, *self.each_a, *self.each_b]
        stack = [self.x, self.a, self.b]
        # rounds go back and forth, so the two ends follow themselves and find their weights in the cache: the loops,
        # which gain least by it
        found = {
            "peft loop": Provider(self.peft_loop, loop, join_loop),
            "one LoRA": Provider(self.one_lora, [self.x, self.lone, self.b]),
            REFERENCE: Provider(lambda: self.base(self.x), [self.x]),
            "stacked function": Provider(self.ours, stack, tuple),
            "stacked autograd": Provider(self.stacked, stack, tuple),
        }
        if self.device == "cuda" or self.case.name in COMPILED_ON_CPU:
            found[COMPILED] = Provider(torch.compile(self.stacked), stack, tuple)
        found["loramoe loop"] = Provider(self.loramoe_loop, loop, join_loop)
        return found

    def saved_bytes(self, provider: Provider) -> int:
        """Count the memory that autograd keeps for the backward pass, beside x and weights; each storage once."""
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # while y lives, no storage is freed and used again
            y = provider.run()
        for tensor in (*provider.leaves, self.base.weight):
            found.pop(tensor.untyped_storage().data_ptr(), None)
        del y
        return sum(found.values())


def assert_agreement(layer: Layer, providers: dict[str, Provider]) -> None:
    """Compare outputs and gradients of all that compute the same with those of the stack by autograd."""

    def results(provider: Provider) -> tuple[Tensor, ...]:
        assert provider.join is not None
        return provider.run().detach(), *provider.join(provider.training(layer.dy))

    expected = results(providers["stacked autograd"])
    for name, provider in providers.items():
        if provider.join is None:
            continue
        for what, found, wanted in zip(("y", "dx", "dA", "dB"), results(provider), expected, strict=True):
            error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
            assert error <= TOLERANCE[layer.case.dtype], f"{layer.case.name}, {name}: {what} is off by {error:.1e}"


def flop_ratios(case: GatedCase, mode: str) -> dict[str, float]:
    """FLOPs of the layer with its adapter over those of the frozen layer: W columns of B, P = W + E rows of A."""

    def of(experts: int) -> float:
        width = experts * case.rank
        excess = ((width + case.experts) * case.inputs + width * case.outputs) / (case.inputs * case.outputs)
        return round(1 + (1.0 if mode == "forward" else 1.5) * excess, 4)

    return {"flop_ratio": of(case.experts)} | ({"chosen_flop_ratio": of(case.top_k)} if case.top_k else {})


def prepare(case: str, provider: str) -> Callable[[], object]:
    """What a process of its own runs to see a provider's peak of memory (`benchmarks.memory`)."""
    layer = Layer(CASES[case], "cpu")
    found = layer.providers()[provider]
    found.training(layer.dy)  # what libraries set up at their first call is not the provider's
    return lambda: found.training(layer.dy)


def peak_bytes(layer: Layer, name: str, provider: Provider) -> int:
    """Peak of memory of a pass forward and backward, above what is held before."""
    if layer.device != "cuda":
        return extra_peak("benchmarks.ops.bench_gated_adapter:prepare", case=layer.case.name, provider=name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.training(layer.dy)
    return torch.cuda.max_memory_allocated() - before


def race_case(case: GatedCase, device: str, repeats: int = 9) -> list[dict[str, object]]:
    """Time every provider of one case in both modes -> rows. Fails where they do not agree."""
    layer = Layer(case, device)
    providers = layer.providers()
    assert_agreement(layer, providers)
    memory = {
        name: {"saved_bytes": layer.saved_bytes(provider)}
        # a compiler's own memory would be counted too
        | ({} if name == COMPILED and device != "cuda" else {"peak_bytes": peak_bytes(layer, name, provider)})
        for name, provider in providers.items()
    }
    modes: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: provider.run for name, provider in providers.items()},
        "forward+backward": {name: lambda p=provider: p.training(layer.dy) for name, provider in providers.items()},
    }
    rows = []
    for mode, variants in modes.items():
        flops = flop_ratios(case, mode)
        times = rounds(variants, repeats, warmup=2, device=device)
        for name, values in times.items():
            p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
            against = ratio(values, times[REFERENCE])
            row = {
                "op": "gated_adapter",
                "case": case.name,
                "shape": case.shape,
                "dtype": case.dtype,
                "mode": mode,
                "provider": name,
                "median_ms": round(statistics.median(values), 4),
                "p20_ms": round(p20, 4),
                "p80_ms": round(p80, 4),
                "repeats": len(values),
                "ratio_to_reference": against.ratio,
                "ratio_p20": against.p20,
                "ratio_p80": against.p80,
                **flops,
                "ratio_to_flops": round(against.ratio / flops["flop_ratio"], 4),
                **memory[name],
            }
            rows.append(row)
    return rows


def race(device: str = "cpu") -> list[dict[str, object]]:
    """Time every case -> rows."""
    return [
        row for case in (GATED_ADAPTER_CUDA if device == "cuda" else GATED_ADAPTER) for row in race_case(case, device)
    ]
